"""``pitome-mllm ask``: a model's answer with merged tokens, and beside it the plain model's."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import UserError
from ..serving.prompts import tokens_read, what_it_answers
from ..serving.resolution import CONTROL, cell
from ._inputs import Subject, encode, encode_smaller, read_subject
from ._options import add_merging, add_model, add_subject, check_method, merging, open_model, positive
from ._report import (
    TIMED_TOKENS,
    Run,
    add_costs,
    add_times,
    describe_device,
    in_mode,
    print_comparison,
    print_json,
    what_decides,
)

NEW_TOKENS = 64  # longest answer where neither the command line nor the model sets a limit


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "ask", help="ask a question about a picture", description="Ask a question about a picture, with merged tokens."
    )
    add_subject(parser, question=True)
    add_model(parser)
    add_merging(parser)
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="longest answer (default: the model's own limit, else 64)"
    )
    group.add_argument("--compare", action="store_true", help="also ask the plain model; show what both cost")
    group.add_argument("--repeats", type=positive, default=5, metavar="N", help="for --compare (%(default)s)")
    group.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Answer one question."""
    from ..attach import attach

    check_method(options.method)
    subject = read_subject(options)
    if subject.question is None:
        raise UserError(_ask_for_a_question(options, subject))
    model, processor = open_model(options)
    if options.max_new_tokens is None:
        options.max_new_tokens = model.generation_config.max_new_tokens or NEW_TOKENS
    with attach(model, options.method, **merging(options)) as handle:
        longest = max(options.max_new_tokens, TIMED_TOKENS if options.compare else 0)
        inputs = encode(model, processor, subject, subject.question, longest)
        if not options.json:
            sys.stdout.write(f"{subject.name}: {subject.question}\n")
        asked = {"merged": inputs}
        if options.compare:
            asked = {"plain": inputs, **_rival(model, processor, subject, longest, handle, inputs), **asked}
        runs = [_one(options, model, processor, inputs, handle, mode) for mode, inputs in asked.items()]
        if options.compare:
            settings = {"merged": {"method": options.method, **merging(options)}}
            runs = [add_costs(run, model, settings.get(run.mode, {})) for run in runs]
            runs = add_times(runs, model, asked, handle, options.repeats)
        _conclude(options, model, subject, handle, runs)


def _ask_for_a_question(options: argparse.Namespace, subject: Subject) -> str:
    if options.model != "tiny":
        return f"a picture needs a question: pitome-mllm ask {subject.name} 'What is this?' --model {options.model}"
    from ..loading import TokenizersBackend

    return f"a picture needs a question; {what_it_answers(TokenizersBackend)}"


def _rival(model: Any, processor: Any, subject: Subject, new_tokens: int, handle: Any, inputs: Any) -> dict[str, Any]:
    """Where pictures keep their size, what the plain model is asked about one of as many tokens as are left."""
    if handle.plan.where != "packed" or not cell(processor):
        return {}
    (full,), _ = tokens_read(model, inputs)
    return {CONTROL: encode_smaller(model, processor, subject, new_tokens, handle.plan.kept(full))}


def _one(options: argparse.Namespace, model: Any, processor: Any, inputs: Any, handle: Any, mode: str) -> Run:
    """Answer with (mode "merged") or without (other modes) merging."""
    plan, ((full,), _) = handle.plan, tokens_read(model, inputs)
    sized = plan.geometry.family.side > 0  # of tiles only those behind the tower know how many they come to
    known = mode != "merged" or sized or not plan.geometry.family.tiles
    visual = full if mode != "merged" else plan.kept(full) if sized else plan.keep
    if not options.json:
        sys.stdout.write(f"{mode}, {visual if known else 'some'} of {full} visual tokens: ")
    with in_mode(handle, mode):
        answer = generate(model, processor, inputs, options.max_new_tokens, stream=not options.json)
    (visual,), (read,) = tokens_read(model, inputs, handle.stats if mode == "merged" else None)
    return Run(visual, read, mode=mode, answer=answer)


def generate(model: Any, processor: Any, inputs: Any, new_tokens: int, stream: bool) -> str:
    """The greedy answer; with ``stream`` its words appear on stdout as they come."""
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    writer = Writer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, streamer=writer)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _conclude(options: argparse.Namespace, model: Any, subject: Subject, handle: Any, runs: list[Run]) -> None:
    """What was asked for besides the answer: the true answer, the table, the JSON object."""
    about = {
        "model": options.model,
        "device": describe_device(model),
        "picture": subject.name,
        "question": subject.question,
        "true_answer": subject.truth,
        "method": handle.plan.method,
        **merging(options),
        "keep": handle.plan.keep,
    }
    if options.json:
        print_json(about, runs)
        return
    if subject.truth is not None:
        sys.stdout.write(f"true answer: {subject.truth}\n")
    if options.compare:
        settings = {"method": options.method, **merging(options)}
        known = runs[0].gflops is not None
        share = handle.plan.keep / handle.plan.available
        print_comparison(about, runs, options.repeats, what_decides(model, settings, share) if known else "")
