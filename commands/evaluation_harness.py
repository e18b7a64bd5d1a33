"""A VideoNSA checkpoint as a chat model of lmms-eval, whose tasks ask it and score its answers."""

import sys

import lmms_eval.__main__ as harness
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from commands.evaluation_manifest import describe_medium, write_manifests
from commands.evaluation_model import UNREADABLE, EvaluatedModel, generation_settings


class VideoNSA(EvaluatedModel, lmms):
    """`EvaluatedModel` with the methods that lmms-eval calls; model_args are its arguments."""

    is_simple = False
    loaded = None  # the last one made, which lmms-eval does not hand out

    def __init__(self, pretrained, max_batch_size=None, **settings):
        lmms.__init__(self)
        EvaluatedModel.__init__(self, pretrained, **settings)
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        type(self).loaded = self

    def generate_until(self, requests):
        """One answer per request."""
        # Nobody scores what only keeps processes in step.
        scored = [one for one in requests if not one.metadata.get("__padding_only__")]
        shown = tqdm(scored, disable=self.rank > 0, desc="Answering")
        records = iter(self.answer_all(map(self._sample, shown)))
        return [
            GenerationResult("")
            if request.metadata.get("__padding_only__")
            else _result(next(records))
            for request in requests
        ]

    def _sample(self, request):
        """A sample of a request: what it asks, and its record so far."""
        _, to_messages, asked, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        sample = {"task": task, "doc_id": doc_id, "split": split, "messages": None, "error": None}
        try:
            messages = ChatMessages(messages=to_messages(doc)).to_hf_messages()
            media = [part for one in messages for part in one["content"] if part["type"] != "text"]
            if not media and any("video" in name for name in doc):
                raise OSError("the task found no video for this sample")
            sample["messages"] = messages
            sample["files"] = [describe_medium(part) for part in media]
        except UNREADABLE as error:
            sample["error"] = str(error) or type(error).__name__
        sample["generation"] = generation_settings(asked)
        return sample

    def loglikelihood(self, requests):
        raise NotImplementedError("VideoNSA answers in words; choose a generate_until task.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("evaluation.py asks one question a sample, not several rounds.")


def _result(record):
    counts = TokenCounts(record.get("prompt_tokens"), record.get("answer_tokens"))
    return GenerationResult(record.get("answer", ""), counts)


def run(arguments, output_path, argv, preset) -> list[Exception]:
    """Runs lmms-eval with its arguments and writes the manifests; returns what went wrong.

    argv: the command, and preset: the record of its preset, for the manifests.
    """
    MODEL_REGISTRY_V2.register_manifest(
        ModelManifest("videonsa", chat_class_path=f"{__name__}.VideoNSA"), overwrite=True
    )
    VideoNSA.folder = output_path / "answers"
    errors, stock = [], harness.cli_evaluate_single

    def evaluate(args):
        try:
            results, samples = stock(args)
            if results is not None:  # on the first process
                args.command, args.preset_record = argv, preset
                for path in write_manifests(VideoNSA.loaded, args, results, samples):
                    logger.info(f"Manifest: {path}")
        except Exception as error:  # lmms-eval only logs it
            errors.append(error)
            raise
        return results, samples

    given, sys.argv = sys.argv, ["lmms-eval", *arguments]
    harness.cli_evaluate_single = evaluate
    try:
        harness.cli_evaluate()
    finally:
        harness.cli_evaluate_single, sys.argv = stock, given
    return errors
