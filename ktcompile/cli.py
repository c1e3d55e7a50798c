"""The `ktrans` command. Heavy imports are inside the commands, so that `--help` is quick."""

import errno
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from ktcompile.checkpoint import Checkpoint
    from ktcompile.generate import Session
    from ktcompile.plan import Plan
    from ktcompile.target import Target

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run giant mixture-of-experts models on one machine, compiled by small graph passes.",
)
err = Console(stderr=True, highlight=False)
out = Console(highlight=False, soft_wrap=True)

Model = Annotated[
    str | None,
    typer.Argument(
        help="A GGUF file, or a folder with config.json, tokenizer and safetensors. Default: the embedded model."
    ),
]
Gguf = Annotated[
    str | None, typer.Option(help="Take the routed experts from this GGUF file, and what the folder MODEL lacks.")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Quantise the routed experts while loading, lossy: int8 (q8_0), int4 (q4_k), fp8, int8_row (a scale a "
        "row), int4_32, int4_64, int4_128 (one for so many weights), q8_0, q6_k, q5_k, q5_0, q4_k, q4_0; or "
        "GLOB=ENCODING,..."
    ),
]
PackedCache = Annotated[
    str | None,
    typer.Option(help="Keep packed experts for the next start: user (cache folder), model (beside it), or a folder."),
]
Rules = Annotated[str | None, typer.Option(help="Rules file, or a shipped one by name. Default: by model family.")]
Experts = Annotated[int | None, typer.Option(help="Keep this many of the router's experts a token. Lossy.")]
Ranking = Annotated[str | None, typer.Option(help="Which experts --experts keeps: choice (default) or weight.")]
Dtype = Annotated[str | None, typer.Option(help="Compute type: fp32 (default on a CPU) or bf16 (default on a GPU).")]
CacheDtype = Annotated[
    str | None, typer.Option(help="fp8 keeps cached latents in 8 bits: lossy. Default: the compute type.")
]
ChunkSize = Annotated[
    int | None, typer.Option(min=1, help="Prompt tokens a step. Default: 512, with a GPU 2048 or what fits.")
]
ContextSize = Annotated[
    int | None,
    typer.Option("--context", help="Most tokens of prompt and answers. Default: 4096, or what the model can."),
]
Vram = Annotated[
    str | None, typer.Option(help="Use at most this much of each GPU's memory (24G). Default: all that it has.")
]
Threads = Annotated[
    int | None, typer.Option("--cpu-threads", help="CPU threads. Default: all cores, from 8 on all but one.")
]


@contextmanager
def _progress(what: str, *columns: ProgressColumn) -> Iterator[tuple[Progress, Any]]:
    """A bar on stderr, and its task; quiet where stderr is no terminal. Default columns: bytes, speed, time left."""
    columns = columns or (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    shown = (TextColumn(what + " {task.description}"), BarColumn(), *columns)
    with Progress(*shown, console=err, transient=True, disable=not err.is_terminal) as bar:
        yield bar, bar.add_task("", total=None)


def _machine(gpu: str | None, ram: str | None, threads: int | None = None, vram: str | None = None) -> "Target":
    from ktcompile.target import detect, fake, with_sizes, with_vram

    if gpu is None and ram is None:
        found = detect(threads)
    elif gpu is None or ram is None:
        found = with_sizes(detect(), gpu, ram)
    else:
        found = fake(None if gpu.lower() == "none" else gpu, ram)
    return found if vram is None else with_vram(found, vram)


def _open(model: str | None, gguf: str | None) -> "Checkpoint":
    import_module("ktcompile.model")
    from ktcompile.checkpoint import open_checkpoint

    if not gc.isenabled():  # the imports are done: what they made is never looked at again
        gc.freeze()
        gc.enable()
    return open_checkpoint(model, gguf)


# ------------------------------------------------------------------------------------------------ chat


@app.command()
def chat(
    model: Model = None,
    gguf: Gguf = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and end: only the answer goes to stdout.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The same, with the prompt from a file; - is stdin.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens an answer.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's, or 0.6.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus. Default: the model's, or 0.95.")] = None,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    force_think: Annotated[bool, typer.Option("--force-think", help="Start the answer inside <think>.")] = False,
    experts: Experts = None,
    ranking: Ranking = None,
    quantize: Quantize = None,
    rules: Rules = None,
    dtype: Dtype = None,
    context: ContextSize = None,
    cache_dtype: CacheDtype = None,
    chunk_size: ChunkSize = None,
    vram: Vram = None,
    packed_cache: PackedCache = None,
    cpu_threads: Threads = None,
) -> None:
    """Talk to a model: a conversation in the terminal, or one answer with --prompt."""
    text = _one_prompt(prompt, prompt_file)
    from ktcompile.generate import Sampling, Session, stop_tokens

    start = time.perf_counter()
    target = _machine(None, None, cpu_threads)
    checkpoint = _open(model, gguf)
    defaults = checkpoint.generation
    sampling = Sampling(*_temperature_and_top_p(defaults, temperature, top_p), top_k, min_p, seed)
    given = (experts, ranking, quantize, rules, dtype, context, packed_cache, vram, cache_dtype, chunk_size)
    compiled = _load(checkpoint, target, start, *given)
    session = Session(compiled, checkpoint.tokenizer, sampling, stop_tokens(checkpoint.tokenizer, defaults))
    history = [{"role": "system", "content": system}] if system else []
    if text is not None:
        _answer(session, [*history, {"role": "user", "content": text}], max_new_tokens, force_think)
        return
    _converse(session, history, max_new_tokens, force_think)


def _load(
    checkpoint: "Checkpoint",
    target: "Target",
    start: float,
    experts: int | None,
    ranking: str | None,
    quantize: str | None,
    rules: str | None,
    dtype: str | None,
    context: int | None,
    packed_cache: str | None,
    vram: str | None = None,
    cache_dtype: str | None = None,
    chunk: int | None = None,
    cache_tokens: int | None = None,
    told: Callable[[str, int, int], None] | None = None,
) -> Any:
    """The compiled model; what is done, how long it took since `start` and what is lossy goes to stderr.

    `told` hears of the progress too: a region, bytes done, bytes in all.
    """
    import torch

    from ktcompile.model import load, torch_threads

    err.print(f"[dim]loading {checkpoint.name}[/dim]", soft_wrap=True)
    with _progress("packing") as (bar, task):

        def progress(region: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=region)
            if told is not None:
                told(region, done, total)

        compiled: Any = load(
            checkpoint,
            rules=rules,
            experts=experts,
            ranking=ranking,
            quantize=quantize,
            dtype=dtype,
            context=context,
            cache_dtype=cache_dtype,
            chunk=chunk,
            cache_tokens=cache_tokens,
            target=target,
            vram=vram,
            packed_cache=packed_cache,
            compile_cache=True,
            progress=progress,
        )
    for note in compiled.compile_cache.notes:
        err.print(f"[dim]compile cache: {note}[/dim]", soft_wrap=True)
    if kept := compiled.store.cache:
        for note in (f"{kept.loaded} regions read from {kept.folder}, {kept.saved} written", *kept.notes):
            err.print(f"[dim]packed cache: {note}[/dim]", soft_wrap=True)
    torch.set_num_threads(torch_threads(compiled.plans["decode"], target))
    err.print(f"[dim]{checkpoint.name}, loaded in {time.perf_counter() - start:.1f} s[/dim]", soft_wrap=True)
    for what in compiled.plans["decode"].lossy:
        err.print(f"[dim]lossy: {what}[/dim]", soft_wrap=True)
    return compiled


def _temperature_and_top_p(
    defaults: Any, temperature: float | None = None, top_p: float | None = None
) -> tuple[float, float]:
    """What is given, else what the model's own defaults say, else 0.6 and 0.95."""

    def first(given: float | None, name: str, otherwise: float) -> float:
        return next(v for v in (given, getattr(defaults, name, None), otherwise) if v is not None)

    return first(temperature, "temperature", 0.6), first(top_p, "top_p", 0.95)


def _one_prompt(prompt: str | None, file: Path | None) -> str | None:
    from ktcompile.errors import RulesError

    if prompt is not None and file is not None:
        raise RulesError("--prompt and --prompt-file: give one of them")
    if file is not None:
        try:
            prompt = (sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")).rstrip("\n")
        except OSError as error:
            raise RulesError(f"--prompt-file {str(file)!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RulesError(f"--prompt-file {str(file)!r} is not UTF-8 text") from error
    if prompt is not None and not prompt.strip():
        raise RulesError("the prompt is empty; leave --prompt out for a conversation")
    return prompt


def _answer(session: "Session", messages: Sequence[dict[str, str]], most: int, think: bool) -> str:
    """Stream one answer to stdout, statistics to stderr. Ctrl-C stops the answer, not the program."""
    from ktcompile.generate import encode_chat

    ids = encode_chat(session.tokenizer, messages, True if think else None)
    pieces: list[str] = []
    stopped = ""
    stream = session.stream(ids, most)
    try:
        for piece in stream:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = "; stopped"
    finally:
        stream.close()  # type: ignore[attr-defined]
    sys.stdout.write("\n")
    sys.stdout.flush()
    err.print(f"[dim]{session.statistics}{stopped}[/dim]", soft_wrap=True)
    return "".join(pieces)


def _converse(session: "Session", history: list[dict[str, str]], most: int, think: bool) -> None:
    from ktcompile.errors import CapacityError

    err.print("[dim]Enter sends, Alt+Enter is a new line. /new starts over, Ctrl-C stops an answer, Ctrl-D ends.[/dim]")
    ask = _reader()
    start = list(history)
    while True:
        try:
            text = ask().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if not text:
            continue
        if text == "/new":
            history = list(start)
            err.print("[dim]new conversation[/dim]")
            continue
        history = [*history, {"role": "user", "content": text}]
        try:
            answer = _answer(session, history, most, think)
        except CapacityError as error:  # what was said before stays; a shorter message may do
            err.print(f"{error}", markup=False, style="red", soft_wrap=True)
            history = history[:-1]
            continue
        history.append({"role": "assistant", "content": answer})


def _reader() -> Any:
    """What asks for the next message: an editor with history on a terminal, lines of stdin elsewhere."""
    if not sys.stdin.isatty():
        return lambda: _line(sys.stdin.readline())
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    folder = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "ktcompile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        past: Any = FileHistory(str(folder / "history"))
    except OSError:
        past = InMemoryHistory()
    editor: Any = PromptSession(history=past, multiline=True, key_bindings=keys)
    return lambda: editor.prompt("> ")


def _line(text: str) -> str:
    if not text:
        raise EOFError
    return text


# ------------------------------------------------------------------------------------------------ serve


@app.command()
def serve(
    model: Model = None,
    gguf: Gguf = None,
    host: Annotated[str, typer.Option(help="Address. Others than this machine's own need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must bring.", envvar="KTRANS_API_KEY", show_envvar=True)
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="The same, the first line of a file.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens an answer, where a request says none. Default: what fits.")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 8,
    cache_lens: Annotated[
        int | None, typer.Option(min=16, help="Tokens of all requests together. Default: --context.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come later.")] = 256,
    force_think: Annotated[bool, typer.Option("--force-think", help="Start answers inside <think>.")] = False,
    experts: Experts = None,
    ranking: Ranking = None,
    quantize: Quantize = None,
    rules: Rules = None,
    dtype: Dtype = None,
    context: ContextSize = None,
    cache_dtype: CacheDtype = None,
    chunk_size: ChunkSize = None,
    vram: Vram = None,
    packed_cache: PackedCache = None,
    cpu_threads: Threads = None,
    print_vscode: Annotated[bool, typer.Option("--print-vscode", help="Print VS Code's settings, and end.")] = False,
    print_continue: Annotated[bool, typer.Option("--print-continue", help="The same for Continue.")] = False,
    print_zed: Annotated[bool, typer.Option("--print-zed", help="The same for Zed.")] = False,
    print_aider: Annotated[bool, typer.Option("--print-aider", help="The same for aider.")] = False,
) -> None:
    """Serve a model: OpenAI's API for editors, and a page to chat on."""
    from ktcompile.errors import RulesError
    from ktcompile.generate import Sampling, stop_tokens
    from ktcompile.model import settings_for
    from ktcompile.server import LOOPBACK, State, listen
    from ktcompile.server import serve as run
    from ktcompile.server.editors import EDITORS, Served

    start = time.perf_counter()
    key = _key(api_key, api_key_file)
    local = host in LOOPBACK
    if not local and key is None:
        raise RulesError(f"--host {host}: whoever reaches this address could use the model; give --api-key")
    asked = {"vscode": print_vscode, "continue": print_continue, "zed": print_zed, "aider": print_aider}
    listener = None if any(asked.values()) else listen(host, port)
    target = _machine(None, None, cpu_threads, vram)
    checkpoint = _open(model, gguf)
    name = re.sub(r"[^a-z0-9._-]+", "-", checkpoint.name.lower()).strip("-")
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    base = f"http://{shown}:{port if listener is None else listener.getsockname()[1]}"
    if listener is None:
        tokens = settings_for(checkpoint, rules=rules, target=target, dtype=dtype, context=context).context
        for editor in (e for e, wanted in asked.items() if wanted):
            sys.stdout.write(EDITORS[editor](Served(base, name, tokens, key is not None)) + "\n")
        return
    defaults = checkpoint.generation
    sampling = Sampling(*_temperature_and_top_p(defaults))
    given = (experts, ranking, quantize, rules, dtype, context, packed_cache, vram, cache_dtype, chunk_size)

    def load(state: State) -> None:
        from ktcompile.engine import Engine

        def told(what: str, done: int, total: int) -> None:
            state.progress = (what, done, total)

        compiled = _load(checkpoint, target, start, *given, cache_tokens=cache_lens, told=told)
        told("the cache", 0, 1)
        engine = Engine(
            compiled,
            checkpoint.tokenizer,
            cache_tokens=cache_lens,
            max_batch=max_batch_size,
            max_queue=max_queue,
        )
        engine.start()
        state.tokenizer = checkpoint.tokenizer
        state.stop_tokens = stop_tokens(checkpoint.tokenizer, defaults)
        state.page = compiled.plans["decode"].text()
        state.engine = engine

    def ready() -> None:
        err.print(f"serving {name} at {base}/, OpenAI's API at {base}/v1; Ctrl-C ends", soft_wrap=True)

    state = State(name, sampling, max_new_tokens, force_think)
    run(state, load, listener=listener, key=key, hosts=LOOPBACK if local else None, ready=ready)
    if state.failed is not None:
        raise RulesError(state.failed)


def _key(given: str | None, file: Path | None) -> str | None:
    from ktcompile.errors import RulesError

    if given is not None and file is not None:
        raise RulesError("--api-key and --api-key-file: give one of them")
    if file is not None:
        try:
            given = file.read_text(encoding="utf-8").split("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RulesError(f"--api-key-file {str(file)!r}: {getattr(error, 'strerror', None) or error}") from error
    if given is not None and not given.strip():
        raise RulesError("the API key is empty")
    return given


# ------------------------------------------------------------------------------------------------ bench


@app.command()
def bench(
    model: Model = None,
    gguf: Gguf = None,
    prompts: Annotated[
        str | None, typer.Option("--n-prompt", "-p", help="Prompt lengths. Default: 512,2048, as far as they fit.")
    ] = None,
    new: Annotated[str | None, typer.Option("--n-gen", "-n", help="Tokens to generate. Default: 64.")] = None,
    depths: Annotated[str, typer.Option("--n-depth", "-d", help="Generate after so many tokens.")] = "0",
    batches: Annotated[str, typer.Option("--batch", "-b", help="Generate for so many requests at once.")] = "1",
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, help="Runs of each test, after one that does not count.")
    ] = 3,
    chunk_size: ChunkSize = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the steps for chrome://tracing or Perfetto.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write one step as an HTML page: of decode, if that is measured.")
    ] = None,
    experts: Experts = None,
    ranking: Ranking = None,
    quantize: Quantize = None,
    rules: Rules = None,
    dtype: Dtype = None,
    context: Annotated[
        int | None, typer.Option(help="Most tokens a request may hold. Default: what the tests need.")
    ] = None,
    cache_dtype: CacheDtype = None,
    packed_cache: PackedCache = None,
    cpu_threads: Threads = None,
) -> None:
    """Measure tokens a second, and where the time of a step goes. Lists as 1,16,512; 0 leaves a kind out."""
    from ktcompile.bench import context_for, numbers, tests_for
    from ktcompile.generate import chunk_of
    from ktcompile.model import settings_for
    from ktcompile.report import run
    from ktcompile.timeline import chrome_trace
    from ktcompile.timeline import timeline as page
    from ktcompile.version import __version__

    start = time.perf_counter()
    lengths = None if prompts is None else numbers(prompts, "-p", 0)
    generated = None if new is None else numbers(new, "-n", 0)
    after, at_once = numbers(depths, "-d", 0), numbers(batches, "-b", 1)
    for option, file in (("--json", as_json), ("--trace", trace), ("--timeline", timeline)):
        _check_writable(option, file)
    target = _machine(None, None, cpu_threads)
    checkpoint = _open(model, gguf)
    chosen = settings_for(checkpoint, rules=rules, target=target, dtype=dtype, context=context)
    longest = int(getattr(checkpoint.config, "max_position_embeddings", chosen.context))
    most = longest if context is None else context
    tests = tests_for(lengths, generated, after, at_once, most)
    context = context_for(tests, most) if context is None else context
    given = (experts, ranking, quantize, rules, dtype, context, packed_cache)
    compiled = _load(checkpoint, target, start, *given, cache_dtype=cache_dtype, chunk=chunk_size)
    with _progress("measuring", MofNCompleteColumn(), TimeRemainingColumn()) as (bar, task):
        report = run(
            compiled,
            checkpoint.name,
            tests,
            repetitions=repetitions,
            chunk=chunk_of(compiled),
            progress=lambda what, done, total: bar.update(task, completed=done, total=total, description=what),
            version=__version__,
        )
    sys.stdout.write(report.text())
    if as_json is not None:
        _write(as_json, json.dumps(report.json(), indent=1, ensure_ascii=False) + "\n")
    if trace is not None:
        _write(trace, json.dumps(chrome_trace(report.profiles), ensure_ascii=False) + "\n")
    if timeline is not None:
        _write(timeline, page(report.profiles[0], checkpoint.name))


def _check_writable(option: str, path: Path | None) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    from ktcompile.errors import RulesError

    if path is None:
        return
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if path.is_dir() or not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise RulesError(f"{option} {str(path)!r}: cannot be written")


# ------------------------------------------------------------------------------------------------ explain


@app.command()
def explain(
    model: Model = None,
    gguf: Gguf = None,
    phase: Annotated[
        str | None, typer.Option(help="decode or prefill. Default: decode, with more --tokens than 1 prefill.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a step. Default: 1 in decode; in prefill 512, with a GPU up to 2048."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Plan as if there were a GPU of this memory (24G; 2x24G: two), or none.")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Plan as if there were this much RAM (512G).")] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Plan as if the weights were stored so: bf16, fp8, q8_0, q4_k_m, ...")
    ] = None,
    after: Annotated[str | None, typer.Option(help="Show the page after this pass instead of the last.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what each pass changed.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one HTML page with every pass.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write one page a pass into this folder.")] = None,
    experts: Experts = None,
    ranking: Ranking = None,
    quantize: Quantize = None,
    rules: Rules = None,
    dtype: Dtype = None,
    context: ContextSize = None,
    cache_dtype: CacheDtype = None,
    vram: Vram = None,
) -> None:
    """Show on one page what will run where and why, before a weight is read."""
    from ktcompile.errors import RulesError
    from ktcompile.model import PHASES, settings_for
    from ktcompile.model import explain as make_plans
    from ktcompile.plan import html_page

    phase = phase or ("prefill" if (tokens or 1) > 1 else "decode")
    if phase not in PHASES:
        raise RulesError(f"--phase {phase}: there are {' and '.join(PHASES)}")
    checkpoint = _open(model, gguf)
    settings = settings_for(
        checkpoint,
        rules=rules,
        experts=experts,
        ranking=ranking,
        quantize=quantize,
        target=_machine(gpu, ram, vram=vram),
        dtype=dtype,
        context=context,
        cache_dtype=cache_dtype,
    )
    if as_json and diff:
        raise RulesError("--json and --diff: give one of them")
    if after is not None:
        settings.pipeline.until(after)  # an unknown pass is told before the work
    with err.status(f"capturing {checkpoint.name}"):
        every = diff or html is not None or dump is not None or after is not None
        plans = make_plans(checkpoint, settings, phase, tokens, encoding, every=every)
    shown = next((p for p in plans if p.after == after), plans[-1])
    if html is not None:
        _write(html, html_page(plans))
    if dump is not None:
        for i, plan in enumerate(plans):
            _write(dump / f"{i:02}-{plan.after}.txt", plan.text())
    if as_json:
        print(json.dumps(shown.json(), indent=1, ensure_ascii=False))
    elif diff:
        _print_diff(plans)
    elif html is None and dump is None:
        sys.stdout.write(shown.text())


def _write(path: Path, text: str) -> None:
    from ktcompile.errors import RulesError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RulesError(f"cannot write {path}: {error.strerror}") from error
    err.print(f"wrote {path}")


def _print_diff(plans: Sequence["Plan"]) -> None:
    for i, plan in enumerate(plans):
        changed = plan.diff(plans[i - 1]) if i else f"{len(plan.rows)} regions"
        notes = [f"{names}: {why}" if names else why for by, names, why in plan.notes if by == plan.after]
        if changed == "nothing changed" and len(notes) == 1:
            changed += f": {notes.pop()}"
        told = "".join(f"#   {note}\n" for note in notes)
        sys.stdout.write(f"# {plan.after}\n{changed}\n{told}\n")


# ------------------------------------------------------------------------------------------------ model files


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="A .gguf or .safetensors file (of several: any), or a model folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Show what is in a model file: sizes, types, tokenizer, and what would be done with it. Reads headers only."""
    from ktcompile.inspect import inspect_json, inspect_text

    if as_json:
        print(json.dumps(inspect_json(file), indent=1, ensure_ascii=False))
    else:
        sys.stdout.write(inspect_text(file))


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A GGUF file, or a folder with config.json, tokenizer and safetensors.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="NAME.gguf, or a folder for safetensors.")],
    to: Annotated[
        str, typer.Option(help="q8_0, q6_k, q5_k, q5_0, q4_k_m, q4_k, q4_0, bf16, f16, f32; fp8, bf16-safetensors.")
    ],
    gguf: Gguf = None,
    shard: Annotated[str, typer.Option(help="Most bytes of a safetensors file.")] = "5G",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    cpu_threads: Threads = None,
) -> None:
    """Write a model in another encoding: a GGUF file, or a folder of safetensors."""
    from ktcompile.convert import convert as write_model
    from ktcompile.target import size

    checkpoint = _open(source, gguf)
    with _progress("converting") as (bar, task):
        report = write_model(
            checkpoint,
            target,
            to,
            threads=cpu_threads,
            shard_bytes=size(shard),
            force=force,
            progress=lambda _, done, total: bar.update(task, completed=done, total=total),
        )
    out.print(report.text(), markup=False)


# ------------------------------------------------------------------------------------------------ what there is


@app.command()
def passes() -> None:
    """List the passes that a rules file may name, with their options."""
    from dataclasses import fields

    from ktcompile.pipeline import available, default_of

    for name, cls in sorted(available().items()):
        out.print(f"{name}: {_doc(cls)}")
        for what, names in (("requires", cls.requires), ("establishes", cls.establishes)):
            if names:
                out.print(f"    {what} {', '.join(names)}")
        for f in fields(cls):
            out.print(f"    {f.name.replace('_', '-')}: {json.dumps(default_of(f))}")
        out.print()


def _doc(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def _lacking(kernel: Any) -> str | None:
    """Why a kernel cannot run on this machine: pages may be made of a GPU that is not here, and it takes that."""
    from torch.cuda import is_available

    missing: str | None = kernel.missing()
    return missing or ("there is no GPU that torch can use" if kernel.device == "cuda" and not is_available() else None)


@app.command()
def kernels() -> None:
    """List the kernels, and why one cannot run on this machine."""
    from ktcompile.kernel import available

    for name, kernel in available().items():
        why = _lacking(kernel)
        op = "any op" if kernel.op == "*" else kernel.op
        where = {"*": "any device", "cuda": "a GPU", "cpu": "a CPU"}.get(kernel.device, kernel.device)
        out.print(f"{name}: {op} on {where}, {'can run here' if why is None else f'cannot run here: {why}'}")
        out.print(f"    {_doc(type(kernel))}{' Lossy.' if kernel.lossy else ''}")


@app.command()
def tune(
    types: Annotated[
        str | None, typer.Option(help="Storage types of experts, as q4_k,bf16. Default: all that tiles take.")
    ] = None,
    cpu_threads: Annotated[
        int | None,
        typer.Option("--threads", "--cpu-threads", help="CPU threads. Default: all cores, from 8 on all but one."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller experts, fewer runs: a rough answer, soon.")] = False,
) -> None:
    """Measure here from how many tokens on an expert is faster by tiles (AMX), for this user's later starts."""
    from ktcompile.errors import KernelError
    from ktcompile.target import default_threads, detect

    threads = detect(cpu_threads).host.threads or default_threads()
    wanted = [t.strip() for t in types.split(",")] if types is not None else None
    tuners = sorted(metadata.entry_points(group="ktcompile.tuners"), key=lambda e: e.name)
    if not tuners:
        raise KernelError("nothing to tune: no installed package has a tuner; reinstall ktcompile")
    for point in tuners:
        with _progress("measuring", MofNCompleteColumn(), TimeRemainingColumn()) as (bar, task):
            path, table = point.load()(
                wanted,
                threads,
                quick,
                lambda what, done, total: bar.update(task, completed=done, total=total, description=what),
            )
        sys.stdout.write(table)
        err.print(f"wrote {path}", markup=False)


@app.command()
def doctor() -> None:
    """Check this machine: CPU features, GPU, versions, what is missing and how to get it."""
    import platform

    import torch

    from ktcompile.kernel import available
    from ktcompile.target import cpu_features, memory
    from ktcompile.verify import gib

    rows = [("python", platform.python_version())]
    wanted = ("ktcompile", "torch", "transformers", "triton", "safetensors", "tokenizers", "cffi")
    for name in wanted:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append(
                (name, f"not installed; {'needed for a GPU only: ' if name == 'triton' else ''}pip install {name}")
            )
    features = cpu_features()
    isas = [
        f
        for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
        if f in features
    ]
    rows.append(
        (
            "cpu",
            f"{len(os.sched_getaffinity(0))} threads, {gib(memory())}, {' '.join(isas) or 'no vector extensions'}",
        )
    )
    gpus = [
        f"{torch.cuda.get_device_name(i)}, {gib(torch.cuda.get_device_properties(i).total_memory)}"
        for i in range(torch.cuda.device_count())
    ]
    rows.append(("gpu", "; ".join(gpus) or "none that torch can use: everything runs on the CPU"))
    width = max(len(k) for k, _ in rows)
    for key, value in rows:
        out.print(f"{key:<{width}}  {value}")
    missing = {name: why for name, k in available().items() if (why := _lacking(k))}
    out.print()
    for name, why in missing.items():
        out.print(f"kernel {name} cannot run here: {why}")
    out.print(f"{len(available()) - len(missing)} of {len(available())} kernels can run here")


@app.command()
def version() -> None:
    """Print the version."""
    from ktcompile.version import __version__

    out.print(__version__)


def script() -> NoReturn:
    """`main` as a process of its own: it starts without the garbage collector and ends without taking things apart.

    Of the five seconds that a page takes, collecting while importing is half a second, and freeing modules a whole one.
    """
    gc.disable()
    code: object = 0
    try:
        main()
    except SystemExit as done:
        code = done.code
    with suppress(OSError):  # it was said, if it is to be said
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def main() -> None:
    """Run the command; a mistake is one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads sleep instead of spinning against ours
    from ktcompile.errors import KtransError

    arguments = sys.argv[1:] or ["--help"]
    try:
        code = app(arguments, prog_name="ktrans", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except KtransError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(f"no space is left for {error.filename or 'the output'}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer's parser raises; its class is private
            raise
        told = str(error.format_message()).rstrip(" .?")
        _fail(f"{told}. `ktrans --help` and `ktrans COMMAND --help` list what there is")


def _fail(text: str) -> NoReturn:
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)  # a path may hold anything
    err.print(f"ktrans: {text}", markup=False, style="red", soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    script()
