"""The one command line of a package: `python PACKAGE ...` and `moac run PACKAGE ...`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from moac_runtime.errors import MoacError, UsageError
from moac_runtime.host.process import INTERRUPTED, run_process
from moac_runtime.host.sizes import parse_size
from moac_runtime.text.plain_text import decode_prompt

if TYPE_CHECKING:
    from moac_runtime.backends.stranger import Build
    from moac_runtime.engine.chosen import ChosenSampling
    from moac_runtime.engine.model import Model, Sampling
    from moac_runtime.engine.sequence import Generation
    from moac_runtime.engine.stats import Stats

_SHORT_OF_MEMORY = "end other programs, or raise the limit"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
CHOICE: tuple[tuple[str, type, str, str], ...] = (
    ("--temperature", float, "T", "0 takes the likeliest token (the checkpoint's, else 0)"),
    ("--top-k", int, "K", "draw from the K likeliest tokens (the checkpoint's, else all)"),
    ("--top-p", float, "P", "draw from the likeliest of mass P (the checkpoint's, else all)"),
    ("--min-p", float, "P", "drop tokens below P times the best (the checkpoint's, else none)"),
    ("--repetition-penalty", float, "X", "above 1 repeats less (the checkpoint's, else 1)"),
    ("--seed", int, "N", "makes sampling repeatable (another one each time)"),
)


def main(
    argv: Sequence[str] | None = None, *, package: Path | None = None, build: Build | None = None
) -> int:
    """Answer the prompts of `argv` and return the exit code (0, 1, 2, 3 or 130).

    `package`: the package that runs itself, trusted by that; None reads PACKAGE from `argv`.
    `build`: as of `load`. Raises SystemExit for --help, and where SIGTERM or SIGHUP ends it.
    """
    return run_process(
        lambda: _run(_parser(package).parse_args(argv), package, build),
        short_of_memory=_SHORT_OF_MEMORY,
    )


def size_option(text: str) -> int:
    """Bytes, for an option that takes them."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The options that say whose code may run."""
    add = parser.add_argument_group(
        "trust", "Without them no code runs that a package of another user or host brings."
    ).add_argument
    add("--trust", action="store_true", help="let the package's own kernels run")
    add(
        "--require-signature",
        type=Path,
        metavar="KEY",
        help="the public key that must have signed the package, which is trusted then",
    )


def trust_of(options: argparse.Namespace) -> Trust:
    """The same as keywords of `load`."""
    return {"trust": options.trust, "require_signature": options.require_signature}


class Trust(TypedDict):
    """Keywords of `load` that say whose code may run."""

    trust: bool
    require_signature: Path | None


class Parser(argparse.ArgumentParser):
    """Wrong usage becomes the same kind of sentence as every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser(package: Path | None) -> argparse.ArgumentParser:
    parser = Parser(
        prog="moac run" if package is None else f"python {package.name}",
        description="Answer prompts with a package. Several prompts run side by side.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not signed as asked, "
        "130 interrupted.",
        allow_abbrev=False,
    )
    if package is None:
        parser.add_argument("package", type=Path, metavar="PACKAGE", help="the package directory")
    _add_prompts(parser)
    _add_sampling(parser)
    _add_running(parser)
    if package is None:
        add_trust(parser)
    return parser


def parser() -> argparse.ArgumentParser:
    """What `moac run` takes."""
    return _parser(None)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        type=lambda text: ("text", text),
        metavar="TEXT",
        help="a prompt, or - for standard input; may be repeated",
    )
    group.add_argument(
        "--prompt-file",
        dest="prompts",
        action="append",
        type=lambda name: ("file", name),
        metavar="FILE",
        help="a file that holds a prompt; may be repeated",
    )
    group.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    group.add_argument("--raw", action="store_true", help="send prompts as is, no chat template")
    group.add_argument(
        "--parse-special",
        action="store_true",
        help="let control tokens spelt in prompts act as such",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "answers", "Sampling that is left out is as the checkpoint recommends, else greedy."
    )
    add = group.add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    for name, kind, metavar, told in CHOICE:
        add(name, type=kind, metavar=metavar, help=told)
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends an answer; may be repeated",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    add = group.add_argument
    add("--backend", metavar="NAME", help="what runs the model (chosen by what the host has)")
    add(
        "--cpu",
        metavar="SET",
        help="instruction set of the backend cpu: avx2, ... (the best here)",
    )
    add("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (the package's own)")
    add("--threads", type=int, metavar="N", help="CPU threads (every core it may use)")
    add("--capacity", type=int, metavar="N", help="tokens the session holds (prompt + answer)")
    add("--max-batch", type=int, metavar="N", help="prompts that run at once (as memory allows)")
    add(
        "--max-kv-bytes",
        type=size_option,
        metavar="SIZE",
        help="most bytes of keys and values at once, as 500MiB (2GiB, or one prompt's)",
    )
    add("--json", action="store_true", help="one JSON document on standard output")


def _run(options: argparse.Namespace, package: Path | None, build: Build | None) -> int:
    from moac_runtime.engine.chosen import choose_sampling
    from moac_runtime.engine.model import load

    prompts = _read_prompts(options.prompts)
    _check_prompts(prompts, options.system, raw=options.raw)
    sampling = _sampling(options)
    choose_sampling(sampling, None)  # wrong options fail before anything is loaded
    if options.max_batch is not None and options.max_batch < 1:
        raise UsageError(f"--max-batch must be 1 or more, got {options.max_batch}")
    model = load(
        options.package if package is None else package,
        backend=options.backend,
        dtype=options.dtype,
        threads=options.threads,
        cpu=options.cpu,
        build=build,
        **(trust_of(options) if package is None else {"trust": True}),
    )
    chosen = model.sampling(**sampling)
    asked = {
        "system": options.system,
        "raw": options.raw,
        "parse_special": options.parse_special,
        "capacity": options.capacity,
    }
    if options.json or len(prompts) > 1:
        limits = {"max_batch": options.max_batch, "max_kv_bytes": options.max_kv_bytes}
        results = model.generate(prompts, **limits, **asked, **sampling)
        if options.json:
            _print_json(_document(model, prompts, results, chosen))
        else:
            _print_texts(results)
    else:
        results = [_print_stream(model, prompts[0], asked, sampling)]
    _print_stats(model, results[0].stats)
    print(f"sampling {chosen.told()}", file=sys.stderr)
    for note in (model.note, *_sampling_notes(chosen), *_cut_notes(results, chosen)):
        if note is not None:
            print(f"note: {note}", file=sys.stderr)
    return INTERRUPTED if any(r.finish_reason == "interrupted" for r in results) else 0


def _sampling(options: argparse.Namespace) -> Sampling:
    sampling: Any = {name: getattr(options, name) for name in _SAMPLING}
    sampling["stop"] = tuple(options.stop)
    found: Sampling = sampling
    return found


def _read_prompts(sources: list[tuple[str, str]] | None) -> list[str]:
    if not sources:
        raise UsageError("there is no prompt; give --prompt TEXT (- for standard input)")
    if sources.count(("text", "-")) > 1:
        raise UsageError("standard input can be read once; give --prompt - a single time")
    return [_read_prompt(kind, value) for kind, value in sources]


def _read_prompt(kind: str, value: str) -> str:
    if kind == "text" and value != "-":
        return value
    name = f"the prompt file {value}" if kind == "file" else "standard input"
    try:
        return decode_prompt(Path(value).read_bytes() if kind == "file" else _standard_input())
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not {error.encoding.upper()} text (byte {error.start}); save it as UTF-8"
        ) from None


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise MoacError("standard input is closed, so --prompt - has nothing to read; give a text")
    return sys.stdin.buffer.read()


def _check_prompts(prompts: Sequence[str], system: str | None, *, raw: bool) -> None:
    """What can be refused before a package is read; an error names one prompt of several."""
    from moac_runtime.text.messages import check_prompt, named_prompt, text_of

    if system is not None:
        text_of(system, "the system message")
    for number, prompt in enumerate(prompts, start=1):
        with named_prompt(number, len(prompts)):
            check_prompt(prompt, raw=raw)


def _print_stream(model: Model, prompt: str, asked: Any, sampling: Sampling) -> Generation:
    """Text as it comes. An interrupt between two pieces lands here and ends the answer too."""
    stream = model.stream(prompt, **asked, **sampling)
    try:
        for piece in stream:
            print(piece, end="", flush=True)
        generation = stream.generation
    except KeyboardInterrupt:
        generation = stream.interrupt()
    print(flush=True)
    return generation


def _print_texts(results: Sequence[Generation]) -> None:
    for number, result in enumerate(results, start=1):
        print(f"=== {number} of {len(results)} ===")
        print(result.text, flush=True)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2), flush=True)


def _document(
    model: Model, prompts: Sequence[str], results: Sequence[Generation], chosen: ChosenSampling
) -> dict[str, Any]:
    entries = [_entry(p, result) for p, result in zip(prompts, results, strict=True)]
    single = {k: entries[0][k] for k in ("text", "token_ids", "finish_reason")}
    stats = results[0].stats
    return {
        **(single if len(entries) == 1 else {}),
        "results": entries,
        "stats": {
            "prefill_s": stats.prefill_s,
            "prompt_tokens_per_s": stats.prompt_tokens_per_s,
            "decode_s": stats.decode_s,
            "decode_tokens_per_s": stats.decode_tokens_per_s,
            "kv_bytes": {"held": stats.kv_held_bytes, "dense": stats.kv_dense_bytes},
            "peak_memory_bytes": stats.peak_memory_bytes,
            "load_s": model.load_s,
        },
        "sampling": chosen.to_json(),
        "backend": model.backend,
        "kernels": model.kernels,
        "note": model.note,
        "dtype": model.dtype,
        "products": model.products,
        "capacity": results[0].capacity,
    }


def _entry(prompt: str, result: Generation) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": len(result.token_ids),
    }


def _print_stats(model: Model, stats: Stats) -> None:
    share = stats.kv_held_bytes / stats.kv_dense_bytes
    print(
        f"prefill {stats.prompt_tokens} tokens, {_rate(stats.prompt_tokens_per_s)}; "
        f"decode {stats.decoded_tokens} tokens, {_rate(stats.decode_tokens_per_s)}; "
        f"loaded in {model.load_s:.1f} s\n"
        f"KV {_mib(stats.kv_held_bytes)} held, {share:.0%} of dense; "
        f"peak memory {_mib(stats.peak_memory_bytes)}; "
        f"{_backend(model)} {model.dtype}{_products(model)}",
        file=sys.stderr,
    )


def _sampling_notes(chosen: ChosenSampling) -> Iterator[str]:
    """What was asked for, or recommended by the checkpoint, and does nothing."""
    if chosen.idle:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in chosen.idle)
        yield (
            f"{flags} {'has' if len(chosen.idle) == 1 else 'have'} no effect, since the likeliest "
            "token is taken; give --temperature above 0 to sample"
        )
    if chosen.unserved:
        yield (
            f"the checkpoint also recommends {', '.join(chosen.unserved)}, which this runtime "
            "does not do"
        )


def _cut_notes(results: Sequence[Generation], chosen: ChosenSampling) -> Iterator[str]:
    """Answers that ended at the session's capacity, before the longest answer asked for."""
    for row, result in enumerate(results, start=1):
        made, most = len(result.token_ids), chosen.options.max_tokens
        if result.finish_reason == "length" and made < most:
            which = "the answer" if len(results) == 1 else f"answer {row} of {len(results)}"
            yield (
                f"{which} ended after {made} of {most} tokens: the prompt leaves no more of the "
                f"session's {result.capacity}"
            )


def _backend(model: Model) -> str:
    return model.backend if model.kernels is None else f"{model.backend} ({model.kernels})"


def _products(model: Model) -> str:
    """What weights are multiplied in, where it is not what the package computes in."""
    return "" if model.products in (None, model.dtype) else f", products in {model.products}"


def _rate(tokens_per_s: float | None) -> str:
    return "not measured" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f} MiB"
