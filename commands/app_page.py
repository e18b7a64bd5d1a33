"""The page of app.py: player, question and answer, and the film strip of what was looked at.

`Page` lays the components out, and its methods are the handlers: they take the values of some
components and return what changes. What a visitor brings or gets stays in the session's state and
in Gradio's temporary folder.
"""

import filecmp
import html
import os
import threading
from dataclasses import dataclass, field

import gradio as gr

from commands.app_answers import Answerer, as_message
from commands.app_strip import Strip, film_strip, summary
from commands.attention_page import page_of, pictures
from commands.attention_view import View

MOST_LETTERS = 500  # of a question
UPLOAD_MB = 256  # of a video that is uploaded, at most
WAITING = 16  # questions that wait, at most
SESSIONS = 32  # visitors whose conversations are kept, the latest
KEPT_SECONDS = 3600  # that an upload, and what was looked at, is kept

HEADER = """# Ask about a video, and see where the model looks

VideoNSA reads every frame that is taken, but lets each look back at a few blocks of the video only.
Under an answer you see **which moments it was read from**, and **what each moment looked back at**.
"""
TOY = """
This is the toy checkpoint: it knows coloured shapes, and of most other things it says that it does
not know.
"""
HINT = "<p class='hint'>Ask a question, and see here which moments the answer was read from.</p>"
UNRECORDED = (
    "<p class='hint'>What is attended to can be recorded under the paper's semantics only "
    "(nsa_semantics='paper').</p>"
)
LEGEND = (
    "<p class='hint'><i class='key read'></i>where the answer was read "
    "<i class='key asking'></i>the chosen moment: of what came before, it looks back at all that "
    "is not faded. &emsp; Click a moment, or play the video.</p>"
)


@dataclass
class Session:
    """One visitor's conversation.

    turns: (files, question, answer) of each question.  video: the one that was asked about last.
    view: what the film strip shows.
    """

    turns: list = field(default_factory=list)
    video: str | None = None
    view: View | None = None


class Page:
    """The components of the page, and its handlers.

    examples: (Example, Answer) each, of the toy checkpoint; the first one is shown at once.
    blocks: the whole, with its queue, to be launched.
    """

    def __init__(self, answerer: Answerer, examples: list):
        self.answerer, self.examples = answerer, examples
        self.stops = {}  # of each visitor who waits for an answer, what ends it
        self.blocks = gr.Blocks(
            title="VideoNSA", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)
        )
        with self.blocks:
            self.session = gr.State(Session(), time_to_live=KEPT_SECONDS)
            gr.Markdown(HEADER + (TOY if examples else ""))
            with gr.Row():
                with gr.Column(scale=4):
                    self.lay_out_player()
                with gr.Column(scale=5):
                    self.lay_out_conversation()
            self.lay_out_examples()
            self.lay_out_views()
            self.connect()
        self.blocks.queue(max_size=WAITING, default_concurrency_limit=1)

    def lay_out_player(self):
        self.video = gr.Video(
            label=f"Video, up to {UPLOAD_MB} MB", sources=["upload"], height=260, elem_id="player"
        )
        self.taken = gr.Textbox(
            label="What is taken of the video, and what it costs",
            lines=3,
            interactive=False,
            elem_id="taken",
        )

    def lay_out_conversation(self):
        most = self.answerer.max_tokens
        self.chat = gr.Chatbot(
            show_label=False, height=190, render_markdown=False, buttons=[], elem_id="chat"
        )
        with gr.Row():
            self.question = gr.Textbox(
                placeholder="Ask about the video",
                max_length=MOST_LETTERS,
                container=False,
                scale=6,
                elem_id="question",
            )
            self.ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
            self.stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
        with gr.Row():
            self.remember = gr.Checkbox(
                True,
                label="Questions go on from earlier ones",
                container=False,
                scale=3,
                elem_id="remember",
            )
            self.new = gr.Button("New conversation", size="sm", scale=1, elem_id="new")
        with gr.Accordion("How much of a video is read", open=False):
            self.budget = gr.Slider(
                min(64, most - 1),
                most,
                most,
                step=1,
                label="Tokens of the video, at most",
                info=f"More than {most:,} do not fit here. Fewer are faster: frames are left out.",
            )

    def lay_out_examples(self):
        self.samples = gr.Dataset(
            label="Examples with stored answers",
            components=[gr.Video(render=False), gr.Textbox(render=False)],
            samples=[[str(example.clip), example.question] for example, _ in self.examples],
            type="index",
            visible=bool(self.examples),
            elem_id="examples",
        )

    def lay_out_views(self):
        settings = self.answerer.model.config.text_config
        layers, groups = settings.num_hidden_layers, settings.num_key_value_heads
        self.summary = gr.HTML(HINT, elem_id="summary")
        self.strip = gr.HTML("", elem_id="strip")
        with gr.Row():
            self.word = gr.Radio([], label="Word of the answer", elem_id="word")
            self.second = gr.Slider(
                0, 1, 0, label="Moment that looks back", info="seconds; follows the player",
                elem_id="second",
            )  # fmt: skip
            self.layer = gr.Slider(
                -1, layers - 1, -1, step=1, label="Layer", info="-1: all", elem_id="layer"
            )
            self.group = gr.Slider(
                -1, groups - 1, -1, step=1, label="Head group", info="-1: all; of what looks back",
                elem_id="group",
            )  # fmt: skip
        self.draw = gr.Button("Draw gates, heads and the whole timeline", size="sm", elem_id="draw")
        self.report = gr.HTML("", elem_id="report")

    def connect(self):
        private = {"api_visibility": "private"}
        everything = [self.session, self.chat, self.taken, self.question, *self.views()]
        gr.on(
            [self.ask.click, self.question.submit],
            self.on_ask,
            [self.session, self.video, self.question, self.remember, self.budget],
            everything,
            show_progress="hidden",
            **private,
        )
        at_once = {"queue": False, **private}
        self.stop.click(self.on_stop, None, None, **at_once)
        gr.on([self.new.click, self.chat.clear], self.on_new, None, everything, **at_once)
        self.video.upload(
            self.on_upload,
            [self.session, self.video, self.budget],
            [self.session, self.taken, *self.views()],
            show_progress="hidden",
            **private,
        )
        self.draw.click(self.on_draw, self.session, self.report, **private)
        chosen = [self.session, self.word, self.layer, self.group, self.second]
        gr.on(
            [self.word.input, self.layer.change, self.group.change, self.second.change],
            self.on_choice,
            chosen,
            [self.summary, self.strip],
            show_progress="hidden",
            trigger_mode="always_last",
            **at_once,
        )
        if self.examples:
            outputs = [self.video, *everything]
            self.samples.click(self.on_example, self.samples, outputs, **at_once)
            self.blocks.load(lambda: self.on_example(0), None, outputs, **at_once)

    def views(self):
        sliders = [self.word, self.second, self.layer, self.group]
        return [self.summary, self.strip, *sliders, self.report]

    # Handlers.

    def on_ask(self, session, video, question, remember, budget, request: gr.Request):
        """The answer, piece by piece; then the views of it."""
        question = question.strip()
        if video is None:
            raise as_message(ValueError("there is no video: upload one, or take an example"))
        if not question:
            raise as_message(ValueError("the question is empty: type one under the conversation"))
        if len(question) > MOST_LETTERS:
            raise as_message(ValueError(f"the question has more than {MOST_LETTERS} letters"))
        turns = session.turns if remember else []
        known = bool(turns) and same_file(video, session.video)
        messages = chat_of(turns)
        lines, text = [], ""
        stop = self.stops[request.session_hash] = threading.Event()
        told = self.answerer.answer(turns, None if known else video, question, int(budget))
        try:
            for kind, value in told:
                if kind == "answer":
                    break
                if stop.is_set():
                    yield {self.chat: messages, self.question: question}
                    return
                if kind == "taken":
                    lines.append(value)
                else:
                    text += value
                yield {
                    self.chat: [*messages, *exchange(question, text or "…")],
                    self.taken: "\n".join(lines),
                    self.question: "",
                }
        except gr.Error as error:
            said = html.unescape(error.message)
            yield {self.chat: messages, self.question: question, self.taken: said}
            raise
        finally:
            told.close()
            self.stops.pop(request.session_hash, None)
        turn = ([] if known else [video], question, value.text)
        session = Session([*turns, turn], video, value.view)
        yield {
            self.session: session,
            self.chat: chat_of(session.turns),
            self.taken: "\n".join(value.taken),
            self.question: "",
            **self.show(value.view, UNRECORDED),
        }

    def on_stop(self, request: gr.Request):
        """Ends this visitor's answer at its next piece."""
        if stop := self.stops.get(request.session_hash):
            stop.set()

    def on_new(self):
        return {
            self.session: Session(),
            self.chat: [],
            self.taken: "",
            self.question: "",
            **self.show(None),
        }

    def on_upload(self, session, video, budget):
        """What would be taken, or what is wrong with the file; the views of another one go."""
        changed = {self.session: Session(session.turns, session.video), **self.show(None)}
        try:
            yield changed | {self.taken: self.answerer.plan(video, int(budget))}
        except (ValueError, OSError) as error:
            message = as_message(error, [video])
            yield changed | {self.taken: html.unescape(message.message)}
            raise message from error

    def on_example(self, index):
        """The stored answer to an example's question."""
        example, answer = self.examples[index]
        session = Session([([str(example.clip)], example.question, answer.text)], None, answer.view)
        session.video = str(example.clip)
        return {
            self.video: str(example.clip),
            self.session: session,
            self.chat: chat_of(session.turns),
            self.taken: "\n".join(answer.taken),
            self.question: example.question,
            **self.show(answer.view),
        }

    def on_choice(self, session, word, layer, group, second):
        if session.view is None:
            return gr.skip(), gr.skip()
        word, layer, group = (None if one < 0 else int(one) for one in (word, layer, group))
        return (
            summary(session.view, word, layer),
            film_strip(session.view, word, layer, group, second) + LEGEND,
        )

    def on_draw(self, session):
        """The page that visualize.py writes."""
        if session.view is None:
            raise as_message(ValueError("there is nothing to draw: ask a question first"))
        page = html.escape(page_of(session.view, pictures(session.view)))
        return f'<iframe sandbox title="Report" srcdoc="{page}"></iframe>'

    def show(self, view, hint=HINT):
        """The film strip and its sliders as they are at first; empty, with a hint, without one."""
        if view is None:
            return {self.summary: hint, self.strip: "", self.word: gr.Radio([]), self.report: ""}
        last = round(float(Strip(view).begin[-1]), 2)
        words = [(word.strip(), number) for number, word in enumerate(view.words)]
        words = [word for word in words if any(letter.isalnum() for letter in word[0])]
        return {
            self.summary: summary(view, None, None),
            self.strip: film_strip(view, None, None, None, last) + LEGEND,
            self.word: gr.Radio([("all", -1), *(words if len(words) > 1 else [])], value=-1),
            # A video of one step has one moment, but a slider has two ends.
            self.second: gr.Slider(maximum=max(last, 0.01), value=last, step=0.01),
            self.layer: -1,
            self.group: -1,
            self.report: "",
        }


def exchange(question, answer):
    """The messages of a question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chat_of(turns):
    return [message for _, *turn in turns for message in exchange(*turn)]


def same_file(one, other):
    return os.path.exists(other) and filecmp.cmp(one, other, shallow=False)
