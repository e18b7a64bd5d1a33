"""Which tokens of each request are vision tokens, and each step's rows by them.

vLLM's model runner tells its `ModelState` on the host what a request holds when it comes, and how
many of its tokens are cached at each step. That is enough for chunks, cached prefixes and requests
that were put aside and come again; nothing is read back from the device.
"""

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from .step import Step, make_step, vision_mask


class VideoNSAState(DefaultModelState):
    """vLLM's state of Qwen2.5-VL's requests, and the mask of the vision tokens of each."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.masks = {}
        text = self.model_config.hf_config.text_config
        self.modalities = text.nsa_modalities if text.nsa_enabled else []

    def add_request(self, req_index, new_req_data):
        super().add_request(req_index, new_req_data)
        self.masks[new_req_data.req_id] = vision_mask(
            len(new_req_data.prefill_token_ids), new_req_data.mm_features, self.modalities
        )

    def remove_request(self, req_id):
        super().remove_request(req_id)
        self.masks.pop(req_id, None)

    def prepare_attn(self, input_batch, *args, **kwargs):
        # A dummy batch has requests that nobody added: they are text.
        step = make_step(
            [self.masks.get(req_id) for req_id in input_batch.req_ids],
            input_batch.query_start_loc_np,
            input_batch.num_computed_tokens_np,
        )
        kwargs["model_specific_attn_metadata"] = StepOfBuilders(step)
        return super().prepare_attn(input_batch, *args, **kwargs)


class StepOfBuilders(ModelSpecificAttnMetadata):
    """Hands a step to the builders of backends.py."""

    def __init__(self, step: Step | None):
        self.step = step

    def get_extra_attn_kwargs(self, attn_metadata_builder, num_reqs) -> dict[str, Any]:
        return {"step": self.step}
