"""From a model file to a compiled model, and to its plan without one."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, fx
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ktcompile.budget import smallest_change
from ktcompile.cache import PagedCache, row_layout, windows
from ktcompile.capture import annotate_weights, attention_of, capture, computed, empty_model
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.compile_cache import CompileCache, Compiled
from ktcompile.counters import StreamClock, Work, work
from ktcompile.errors import CapacityError, KtransError, RulesError
from ktcompile.graph import regions, short, value_of
from ktcompile.kernel import Kernel, StepFacts
from ktcompile.kernel import available as available_kernels
from ktcompile.layers import NotEqual, first, layers_of, repeat
from ktcompile.memory import Held, keep_to, out_of_memory, peak_bytes
from ktcompile.packed_cache import PackedCache, packed_folder
from ktcompile.pipeline import Context, Note, Pass, Pipeline, load_rules, make_pass, near, shipped
from ktcompile.pipeline import available as available_passes
from ktcompile.plan import Plan, make_plan
from ktcompile.runtime import Executable, Progress, Step, Store, check_one_layout, lower
from ktcompile.sampling import Choices, Sampled, Sampling, sample
from ktcompile.step_graph import Recordings, StepGraph, StreamedStep
from ktcompile.step_parts import NotCapturable
from ktcompile.symbols import PAGE
from ktcompile.symbols import sizes as symbol_sizes
from ktcompile.target import Target, default_threads, detect, with_vram
from ktcompile.verify import gib
from ktcompile.weights import ImaginedSource, MixedSource, ModuleSource, WeightSource

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
PLANNED_TOKENS: dict[Phase, int] = {"decode": 1, "prefill": 512}
"""Tokens a step that a plan assumes where nobody says how many."""

GPU_CHUNKS = (2048, 1024, 512)
"""Prompt tokens a step with a GPU, where nobody says how many: the first for which its memory suffices.

Every step of so many reads all experts, whatever the number: few large ones cost less than many small ones.
"""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHE_DTYPES = ("fp8",)

MAX_GRAPH_TOKENS = 32
"""Tokens of a decode step that is recorded as one CUDA graph."""

Ints = Tensor | Sequence[int]
"""Whole numbers in a row, on the CPU."""

_FAMILIES = {"deepseek_v3": "deepseek-v3", "deepseek_v2": "deepseek-v3", "kimi_k2": "deepseek-v3"}


def default_rules(config: PretrainedConfig) -> str:
    """Name of the shipped rules for a model of this configuration."""
    name = _FAMILIES.get(config.model_type, "base")
    return name if name in shipped() else "base"


def pipeline_for(
    config: PretrainedConfig | None,
    rules: str | Path | None = None,
    experts: int | None = None,
    ranking: str | None = None,
    quantize: str | None = None,
) -> Pipeline:
    """The pipeline to run: the rules file, or the family's, with `prune-experts` if fewer `experts` are asked for.

    `quantize`: an encoding for the routed experts, or `GLOB=ENCODING,…`, the rules of the pass `quantize`.
    """
    pipeline = load_rules(rules or (default_rules(config) if config else "base"))
    if experts is None and ranking is not None:
        raise RulesError(f"ranking {ranking!r} says which experts to keep; say how many with experts")
    if experts is not None:
        values = {"keep": experts} | ({"ranking": ranking} if ranking else {})
        pipeline = pipeline.with_pass(make_pass(available_passes()["prune-experts"], values, "--experts"))
    if quantize is not None:
        wanted = dict(r.rpartition("=")[::2] for r in quantize.split(","))
        globs = {glob or "*.experts": encoding for glob, encoding in wanted.items()}
        pipeline = pipeline.with_pass(make_pass(available_passes()["quantize"], {"rules": globs}, "--quantize"))
    return pipeline


@dataclass(frozen=True)
class Settings:
    """What a model is compiled for. `context`: most tokens a request may hold. `cache_dtype`: "fp8", or as `dtype`.

    `chunks`: prompt tokens a step, the first that fits.
    """

    target: Target
    pipeline: Pipeline
    dtype: torch.dtype
    context: int
    cache_dtype: str | None = None
    chunks: tuple[int, ...] = (PLANNED_TOKENS["prefill"],)


def settings_for(
    checkpoint: Checkpoint,
    *,
    rules: str | Path | None = None,
    experts: int | None = None,
    ranking: str | None = None,
    quantize: str | None = None,
    target: Target | None = None,
    dtype: str | None = None,
    context: int | None = None,
    cache_dtype: str | None = None,
    chunk: int | None = None,
) -> Settings:
    """Defaults for what is not said: this machine, the family's rules, fp32 on a CPU, bf16 on a GPU, 4096 tokens."""
    target = target or detect()
    name = dtype or ("bf16" if target.main.kind == "cuda" else "fp32")
    if name not in DTYPES:
        raise RulesError(f"no compute type {name!r}; {near(name, DTYPES)}")
    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        raise RulesError(f"no cache type {cache_dtype!r}; {near(cache_dtype, CACHE_DTYPES)}")
    if cache_dtype is not None and row_layout(checkpoint.config).name != "latent":
        kind = checkpoint.config.model_type
        raise RulesError(f"cache type {cache_dtype}: only latents are kept so, and {kind} caches keys and values")
    longest = int(getattr(checkpoint.config, "max_position_embeddings", 4096))
    context = min(4096, longest) if context is None else context
    if not 1 <= context <= longest:
        raise RulesError(f"context {context}: this model was made for 1 to {longest} tokens")
    if chunk is not None and chunk < 1:
        raise RulesError(f"a chunk of {chunk} prompt tokens a step: 1 or more")
    usual = GPU_CHUNKS if target.main.kind == "cuda" else (PLANNED_TOKENS["prefill"],)
    chunks = tuple(dict.fromkeys(min(c, context) for c in (usual if chunk is None else (chunk,))))
    pipeline = pipeline_for(checkpoint.config, rules, experts, ranking, quantize)
    return Settings(target, pipeline, DTYPES[name], context, cache_dtype, chunks)


def settings_of(target: Target, pipeline: Pipeline) -> Settings:
    """Settings for a model that brings its own parameters and cache."""
    return Settings(target, pipeline, torch.float32, 0)


# ------------------------------------------------------------------------------------------------ plans


def _step(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    cache: PagedCache,
    keep: Tensor,
    kinds: Mapping[str, int | None],
) -> Tensor:
    """What is captured: ragged ids `[1, T]`, explicit positions, `keep` the rows whose logits are wanted: float32.

    `kinds`: the window of each kind of layer.
    """
    masks = cache.masks(positions, kinds, additive=attention_of(type(model)) == "eager")
    logits: Tensor = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=masks,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits
    return logits if logits.dtype == torch.float32 else logits.float()


def capture_phase(
    model: PreTrainedModel, phase: Phase, settings: Settings, checkpoint: Checkpoint, *, repeated: bool = True
) -> fx.GraphModule:
    """The annotated graph of one step: decode is one token of one request, prefill any tokens of any requests.

    `repeated`: trace equal layers once where that is known to be right.
    """
    requests, tokens = (1, 1) if phase == "decode" else (2, 5)
    with torch.device("cpu"):
        # The page counts the memory of one request of `context` tokens, however many requests this graph can take.
        each = max(PAGE, -(-settings.context // requests))
        cache = PagedCache(
            model.config,
            requests=requests,
            context=each,
            dtype=settings.dtype,
            ragged=True,
            hollow=True,
            fp8=settings.cache_dtype == "fp8",
        )
        cache.begin([tokens // requests + (r < tokens % requests) for r in range(requests)])
        if cache.page_table.shape[1] == 1:  # dynamo takes a size of one for a constant
            cache.page_table = torch.zeros(requests, 2, dtype=torch.int64)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        positions = torch.zeros(1, tokens, dtype=torch.int64)
        keep = torch.zeros(requests, dtype=torch.int64)
    dynamic: list[tuple[Tensor, int]] = [(cache.page_table, 1)]
    if phase == "prefill":
        dynamic += [
            (cache.page_table, 0),
            (cache.seq_len, 0),
            (cache.query_start, 0),
            (ids, 1),
            (positions, 1),
            (keep, 0),
        ]
    layers = layers_of(model) if repeated else None
    with first(model, layers):
        gm = capture(_step, (model, ids, positions, cache, keep, windows(model.config)), dynamic)
    if layers is not None:
        try:
            repeat(gm, layers)
        except NotEqual:
            return capture_phase(model, phase, settings, checkpoint, repeated=False)
    annotate_weights(gm, checkpoint.source, computed(k for k, _ in model.named_buffers()))
    return gm


def _told(notes: Iterable[Note]) -> list[tuple[str, str, str]]:
    return [(n.by, short(n.path), n.why) for n in notes]


def run_pipeline(
    gm: fx.GraphModule,
    settings: Settings,
    name: str,
    phase: Phase,
    tokens: int,
    *,
    every: bool = False,
    source: WeightSource | None = None,
    suggest: bool = True,
) -> tuple[fx.GraphModule, list[Plan]]:
    """Run the passes; the plans after each pass if `every`, else the last one alone.

    Raises CapacityError; `suggest`: it names the smallest change that would fit, which takes several plans to find.
    """
    ctx = Context(settings.target, source, symbol_sizes(gm, tokens, settings.context))
    if settings.cache_dtype is not None:
        pools = [n for n in gm.graph.nodes if n.op == "placeholder" and n.meta.get("state")]
        size = gib(sum(int(value_of(n).nbytes) for n in pools))
        ctx.lossy(f"cache {size} a request: latents kept in {settings.cache_dtype} (e4m3), their keys in bf16")
    plans: list[Plan] = []
    kernels = available_kernels()
    last = settings.pipeline.passes[-1].name

    def observe(p: Pass, graph: fx.GraphModule, told: Sequence[Note]) -> None:
        if not (every or p.name == last) or not any(regions(graph)):
            return
        notes = _told(told if every and p.name != last else ctx.notes)
        plans.append(
            make_plan(
                graph,
                settings.target,
                model=name,
                phase=phase,
                tokens=tokens,
                context=settings.context,
                after=p.name,
                notes=notes,
                lossy=ctx.losses,
                kernels=kernels,
            )
        )

    try:
        return settings.pipeline.run(gm, ctx, observe), plans
    except CapacityError as error:
        if not suggest:
            raise
        change = smallest_change(error, gm, settings.pipeline, ctx, tokens, settings.context)
        told = f"The smallest change that fits: {change}" if change else "No one change was found that fits"
        raise CapacityError(f"{error}. {told}", error.device, error.excess) from error


def run_phase(
    gm: fx.GraphModule, settings: Settings, checkpoint: Checkpoint, phase: Phase, *, every: bool = False
) -> tuple[fx.GraphModule, list[Plan], Settings]:
    """`run_pipeline` for a step of usual size: of decode one token, of prefill the first of `chunks` that fits.

    The settings come back with that one alone.
    """
    sizes = settings.chunks if phase == "prefill" else (PLANNED_TOKENS[phase],)
    for tokens in sizes:
        is_last = tokens == sizes[-1]
        try:
            made, plans = run_pipeline(
                gm, settings, checkpoint.name, phase, tokens, every=every, source=checkpoint.source, suggest=is_last
            )
        except CapacityError:
            if is_last:
                raise
            continue
        return made, plans, replace(settings, chunks=(tokens,)) if phase == "prefill" else settings
    raise AssertionError("chunks is empty")


def explain(
    checkpoint: Checkpoint,
    settings: Settings,
    phase: Phase = "decode",
    tokens: int | None = None,
    encoding: str | None = None,
    *,
    every: bool = True,
) -> list[Plan]:
    """The plan after each pass (or only the last one, without `every`), the last one last. Reads no weight.

    `encoding`: plan as if the weights were stored so; a configuration without weights needs none and counts as bf16.
    RulesError for a step of so many `tokens` that there is none.
    """
    if tokens is not None and tokens > settings.context:
        raise RulesError(f"{tokens} tokens a step: the context holds {settings.context}")
    if tokens is not None and tokens > PLANNED_TOKENS["decode"] and phase == "decode":
        raise RulesError(f"{tokens} tokens a step of decode: there it is 1; prefill plans steps of several")
    model = empty_model(checkpoint.config, settings.dtype)
    if encoding is not None or checkpoint.source is None:
        shapes = {k: tuple(v.shape) for k, v in (*model.named_parameters(), *model.named_buffers())}
        imagined = ImaginedSource(shapes, encoding or "bf16", model.config.num_hidden_layers)
        checkpoint = replace(checkpoint, source=imagined)
    gm = capture_phase(model, phase, settings, checkpoint)
    if tokens is None:
        return run_phase(gm, settings, checkpoint, phase, every=every)[1]
    return run_pipeline(gm, settings, checkpoint.name, phase, tokens, every=every, source=checkpoint.source)[1]


# ------------------------------------------------------------------------------------------------ load


class _Forward:
    """The forward of a loaded model: rectangular Hugging Face arguments in, ragged steps of the two executables out."""

    def __init__(
        self,
        config: PretrainedConfig,
        settings: Settings,
        phases: Mapping[Phase, Executable],
        pool_devices: Sequence[torch.device],
    ) -> None:
        self.config, self.settings, self.phases, self.pool_devices = config, settings, phases, pool_devices
        self.graphs: dict[int, str] = {}  # tokens a step -> why it is not one CUDA graph, or ""
        self._recorded: WeakKeyDictionary[PagedCache, dict[bool, StepGraph]] = WeakKeyDictionary()  # by: it samples
        self._recordings = Recordings()
        self._streamed: dict[Executable, StreamedStep] = {}
        self._unstreamable: dict[Executable, str] = {}  # why; a decode step's warning says it too
        self._caches: WeakSet[PagedCache] = WeakSet()
        steps = [m for p in phases.values() for m in p.gm.modules() if isinstance(m, Step)]
        used = dict.fromkeys(m.kernel for m in steps)
        self._told = [kernel for kernel in used if type(kernel).begin is not Kernel.begin]
        self._counting = [c for m in steps if (c := m.kernel.counting(m.packed)) is not None]
        main = settings.target.main.torch
        self._clock = StreamClock(main) if main.type == "cuda" else None

    def new_cache(self, requests: int = 1, context: int | None = None) -> PagedCache:
        """An empty ragged cache for `requests` requests of up to `context` tokens each, by default as many as planned.

        Raises CapacityError.
        """
        context = context or self.settings.context
        with out_of_memory(f"a cache for {requests} requests of {context} tokens", self._free):
            made = self._made_cache(requests, context)
        self._caches.add(made)
        return made

    def _made_cache(self, requests: int, context: int) -> PagedCache:
        return PagedCache(
            self.config,
            requests=requests,
            context=context,
            dtype=self.settings.dtype,
            device=self.pool_devices,
            main=self.settings.target.main.torch,
            ragged=True,
            fp8=self.settings.cache_dtype == "fp8",
        )

    def _free(self, cache: PagedCache | None = None) -> None:
        """Let go of what a failed call may have left: graphs of its cache, and memory that torch keeps for later.

        Prompts' experts on the CPU are prepared anew: a call of them may have been submitted and not waited for.
        """
        gpus = [d.torch for d in self.settings.target.devices if d.torch.type == "cuda"]
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        if cache is not None:
            self._forget_graphs(cache, recorded=True)
        for held in self._streamed.values():
            held.close()
        self._streamed.clear()
        if gpus:
            torch.cuda.empty_cache()

    def _forget_graphs(self, cache: PagedCache, *, recorded: bool) -> None:
        """Let go of the step graphs of a cache: all of them, or those that failed before they were recorded."""
        held = self._recorded.get(cache, {})
        for samples, graph in [*held.items()]:
            if recorded or not graph.recorded:
                held.pop(samples).close()

    def memory(self, store: Store) -> dict[str, Held]:
        """What the model holds on each device now, to compare with its plans."""
        pools = dict.fromkeys((d.name for d in self.settings.target.devices), 0)
        for cache in self._caches:
            for device, pool in zip(self.pool_devices, cache.pools, strict=True):
                pools[str(device)] += pool.nbytes
        devices = self.settings.target.devices
        return {d.name: Held(store.nbytes.get(d.name, 0), pools[d.name], peak_bytes(d.torch)) for d in devices}

    def work(self) -> Work:
        """What was computed so far; other models of this process share the CPU's threads, and count."""
        return work(self._counting, self._clock)

    def step(self, ids: Ints, positions: Ints, counts: Sequence[int], keep: Ints, cache: PagedCache) -> Tensor:
        """Logits `[len(keep), vocabulary]` of rows `keep`, float32; ragged: ids and positions `[T]`, counts `[R]`.

        Integers are lists, or tensors on the CPU; of a decode step that is a CUDA graph, lists take less time.
        CapacityError where a request outgrows the cache, or the GPU's memory is full: the cache then holds what it held
        before, and the next call may ask for less.
        """
        return self._checked_step(ids, positions, counts, keep, cache, None)

    def next_tokens(
        self,
        ids: Ints,
        positions: Ints,
        counts: Sequence[int],
        keep: Ints,
        cache: PagedCache,
        how: Sequence[Sampling],
    ) -> Sampled:
        """As `step`, but the token that follows each row `keep`, on the CPU: chosen on the GPU, with the step.

        `how`: the token of each of these rows is chosen, at the position after the row's.
        """
        return Sampled.of(self._checked_step(ids, positions, counts, keep, cache, how))

    def _checked_step(
        self,
        ids: Ints,
        positions: Ints,
        counts: Sequence[int],
        keep: Ints,
        cache: PagedCache,
        how: Sequence[Sampling] | None,
    ) -> Tensor:
        cache.check(counts)
        facts = StepFacts(tuple(cache.lengths), tuple(counts), cache.all_pages)
        try:
            for kernel in self._told:
                kernel.begin(facts)
            asked = (
                f"a step of {len(ids)} tokens for {len(counts)} requests, "
                f"the longest of {max(cache.lengths)} tokens of {cache.context}"
            )
            with out_of_memory(asked, lambda: self._free(cache)), self._clock.step() if self._clock else nullcontext():
                return self._step(ids, positions, counts, keep, cache, how)
        finally:
            for kernel in self._told:
                kernel.end()

    def _step(
        self,
        ids: Ints,
        positions: Ints,
        counts: Sequence[int],
        keep: Ints,
        cache: PagedCache,
        how: Sequence[Sampling] | None,
    ) -> Tensor:
        """Logits, or told `how` packed tokens."""
        main = self.settings.target.main.torch
        if main.type == "cuda" and self._is_decode(counts, keep) and self.graphs.get(len(counts), "") == "":
            at = _listed(positions)
            numbers = [*_listed(ids), *at, *range(len(counts)), *cache.rows()]
            if how is not None:
                numbers += Choices.numbers(how, [p + 1 for p in at])
            try:
                found = self._graph_of(cache, how is not None)(numbers)
            except BaseException as error:
                self._forget_graphs(cache, recorded=False)
                if not isinstance(error, NotCapturable):
                    raise
                self.graphs[len(counts)] = str(error)
                warnings.warn(f"decode steps of {len(counts)} tokens are no CUDA graph: {error}", stacklevel=2)
            else:
                cache.advance()
                return found if how is not None else found[0].clone()  # tokens are read before the next step
        ids, positions, keep = (torch.as_tensor(given, dtype=torch.int64) for given in (ids, positions, keep))
        cache.begin(counts)
        decode = len(counts) == 1 and len(ids) == 1 and len(keep) == 1
        values = {
            "ids": ids[None],
            "positions": positions[None],
            "keep": keep,
            "cache.page_table": cache.page_table,
            "cache.seq_len": cache.seq_len,
            "cache.query_start": cache.query_start,
        }
        values.update({f"cache.layers.{i}.pool": pool for i, pool in enumerate(cache.pools)})
        executable = self.phases["decode" if decode else "prefill"]
        streamed = self._stream_of(executable, len(ids))
        try:
            logits: Tensor = (streamed(values) if streamed else executable(values)[0])[0]
        except BaseException:
            if streamed:  # the CPU may be at what was submitted, and no later step may meet it
                self._streamed.pop(executable).close()
            raise
        if how is None:
            found = logits.cpu() if streamed else logits
        else:
            choices = Choices.of(how, (positions[keep] + 1).tolist())
            with torch.inference_mode():
                found = sample(logits, choices.to(logits.device))
        cache.advance()
        return found

    def _stream_of(self, executable: Executable, tokens: int) -> StreamedStep | None:
        """The executable for this many tokens with the CPU's experts on the GPU's stream; None where it cannot be."""
        main = self.settings.target.main.torch
        is_graph = isinstance(executable.gm, fx.GraphModule)  # not while it is being profiled
        if main.type != "cuda" or executable in self._unstreamable or not is_graph:
            return None
        held = self._streamed.get(executable)
        if held is None or held.tokens < tokens:
            if held is not None:
                self._streamed.pop(executable).close()
            try:
                held = StreamedStep(executable, main, 1 << (tokens - 1).bit_length())
            except NotCapturable as error:
                self._unstreamable[executable] = str(error)
                return None
            self._streamed[executable] = held
        return held

    def _is_decode(self, counts: Sequence[int], keep: Ints) -> bool:
        """Whether every request brings one token and wants its logits."""
        count = len(counts)
        return count <= MAX_GRAPH_TOKENS and all(c == 1 for c in counts) and _listed(keep) == [*range(count)]

    def _graph_of(self, cache: PagedCache, samples: bool) -> StepGraph:
        """The cache's decode step, recorded at its first call. `samples`: it ends with packed tokens."""
        count = cache.requests
        made = self._recorded.setdefault(cache, {})
        if samples not in made:
            state = {f"cache.layers.{i}.pool": pool for i, pool in enumerate(cache.pools)}
            state["cache.page_table"] = cache.all_pages
            shapes = {
                "ids": (1, count),
                "positions": (1, count),
                "keep": (count,),
                "cache.seq_len": (count,),
                "cache.query_start": (count + 1,),
            }
            if samples:
                shapes["choices"] = Choices.shape(count)
            executable = self.phases["decode" if count == 1 else "prefill"]
            main = self.settings.target.main.torch
            last = _sampled if samples else None
            made[samples] = StepGraph(executable, main, count, state, shapes, last=last, beside=self._recordings)
            self.graphs[count] = ""
        return made[samples]

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **unknown: Any,
    ) -> CausalLMOutputWithPast:
        asked = sorted(
            k
            for k, v in unknown.items()
            if v is not None and v is not False and k not in ("return_dict", "cache_position")
        )
        if input_ids is None or asked:
            raise KtransError(
                f"a compiled model takes input_ids, attention_mask, position_ids, past_key_values, use_cache "
                f"and logits_to_keep; got {', '.join(asked) or 'no input_ids'}"
            )
        batch, width = input_ids.shape
        cache = self._cache(past_key_values, batch)
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise KtransError(
                    f"attention_mask must be [batch, tokens], not {list(attention_mask.shape)}: a compiled "
                    "model makes its own causal mask"
                )
            real = attention_mask[:, -width:].bool()
        counts = [int(c) for c in real.sum(1)]
        row = torch.full_like(input_ids, 0)  # [B, S] -> ragged row; padding reads row 0, its logits mean nothing
        row[real] = torch.arange(sum(counts), device=row.device)
        if position_ids is not None:
            positions = position_ids.expand(batch, width)[real]
        else:
            positions = torch.cat([n + torch.arange(c) for n, c in zip(cache.lengths, counts, strict=True)])
        wanted = row[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else row[:, logits_to_keep]
        logits = self.step(input_ids[real], positions, counts, wanted.reshape(-1), cache)
        cache.columns += width
        return CausalLMOutputWithPast(
            logits=logits.unflatten(0, wanted.shape).clone(), past_key_values=None if use_cache is False else cache
        )

    def _cache(self, given: Cache | None, batch: int) -> PagedCache:
        if isinstance(given, PagedCache) and given.ragged:
            if given.requests != batch:
                raise KtransError(f"the cache holds {given.requests} requests, the input has {batch} rows")
            return given
        if given is not None and int(given.get_seq_length()) > 0:
            raise KtransError(
                f"a compiled model keeps its context in a ragged PagedCache, not in a {type(given).__name__}; "
                "pass model.new_cache(batch), or none"
            )
        return self.new_cache(batch)


def _listed(given: Ints) -> list[int]:
    return given.tolist() if isinstance(given, Tensor) else [*given]


def _sampled(logits: Tensor, changing: Mapping[str, Tensor]) -> Tensor:
    """The packed tokens of a step's logits `[1, rows, vocabulary]`: the last nodes of its graph."""
    return sample(logits[0], Choices.unpacked(changing["choices"]))


def load(
    model: str | Path | Checkpoint | None = None,
    *,
    gguf: str | Path | None = None,
    rules: str | Path | None = None,
    experts: int | None = None,
    ranking: str | None = None,
    quantize: str | None = None,
    target: Target | None = None,
    dtype: str | None = None,
    context: int | None = None,
    vram: str | int | None = None,
    cache_dtype: str | None = None,
    chunk: int | None = None,
    cache_tokens: int | None = None,
    packed_cache: str | Path | None = None,
    compile_cache: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A compiled Hugging Face model: call it, or `generate` with it.

    `model`: a GGUF file, a folder, or None for the embedded one. `gguf`: the routed experts for a folder, and what it
    lacks. `experts`: keep that many of the router's top-k (lossy). `quantize`: fewer bits for the routed experts, made
    while loading (lossy): `int4`, `int8`, …, or `GLOB=ENCODING,…`. `vram`: use at most so much of each GPU's memory
    (`24G`); torch's allocator keeps to it in the whole process. `packed_cache`: a folder that keeps packed experts
    for the next start; `user` is the user's cache folder, `model` one beside the model. `compile_cache`: keep the
    compiled graphs in the user's cache folder, and take them from there. Besides the usual methods the model
    has `plans` (by phase), `step`, `next_tokens`, `new_cache`, `memory`, `work`, `chunk` and `context`.
    `cache_dtype`: `fp8` keeps latents in 8 bits (lossy). `chunk`: prompt tokens a step; default: what fits best.
    `cache_tokens`: plan for a cache of so many tokens, of all requests together; default: one request of `context`.
    Raises ModelFileError, RulesError, CapacityError.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, gguf)
    if checkpoint.source is None:
        raise RulesError(f"{checkpoint.path} has a configuration and no weights: it can be explained, not run")
    settings = settings_for(
        checkpoint,
        rules=rules,
        experts=experts,
        ranking=ranking,
        quantize=quantize,
        target=target if vram is None else with_vram(target or detect(), vram),
        dtype=dtype,
        context=context,
        cache_dtype=cache_dtype,
        chunk=chunk,
    )
    hollow = empty_model(checkpoint.config, settings.dtype)
    reuse = _compile_cache(checkpoint, settings) if compile_cache else None
    compiled = reuse.load() if reuse else None
    if compiled is None:
        compiled = _compiled(hollow, settings, checkpoint)
        if reuse:
            reuse.save(compiled)
    graphs, plans, settings = compiled.graphs, compiled.plans, replace(settings, chunks=compiled.chunks)
    if cache_tokens is not None:
        plans = {phase: plans[phase].with_cache(cache_tokens) for phase in reversed(PHASES)}  # prefill needs more
    if vram is not None:
        keep_to(settings.target)
    tables = {k: b for k, b in hollow.named_buffers() if not b.isnan().any()}  # what the model computed itself
    source = MixedSource(checkpoint.source, ModuleSource(tables))
    kept = (
        None if packed_cache is None else PackedCache(packed_folder(packed_cache, checkpoint.path), checkpoint.source)
    )
    store = Store(source, settings.target, available_kernels(), kept)
    phases: dict[Phase, Executable] = {}
    with out_of_memory("loading", torch.cuda.empty_cache):
        for phase in PHASES:
            phases[phase] = lower(graphs[phase], plans[phase], store, None if phases else progress)
    forward = _Forward(checkpoint.config, settings, phases, _pool_devices(graphs["decode"], settings.target))
    hollow.forward = torch.compiler.disable(forward.__call__)
    extra = {"plans": plans, "step": forward.step, "new_cache": forward.new_cache, "store": store, "phases": phases}
    extra |= {
        "compile_cache": reuse,
        "next_tokens": forward.next_tokens,
        "graphs": forward.graphs,
        "memory": lambda: forward.memory(store),
        "work": forward.work,
        "chunk": settings.chunks[0],
        "context": settings.context,
    }
    for name, value in extra.items():
        setattr(hollow, name, value)
    hollow.generation_config = checkpoint.generation
    return hollow


def _compiled(hollow: PreTrainedModel, settings: Settings, checkpoint: Checkpoint) -> Compiled:
    """Both phases captured and taken through the pipeline."""
    graphs: dict[str, fx.GraphModule] = {}
    plans: dict[str, Plan] = {}
    for phase in reversed(PHASES):  # prefill needs more memory: what is told that fits does so in both
        gm = capture_phase(hollow, phase, settings, checkpoint)
        graphs[phase], (plans[phase],), settings = run_phase(gm, settings, checkpoint, phase)
    check_one_layout(list(graphs.values()))
    return Compiled(graphs, plans, settings.chunks, settings.target.host.bandwidth)


def _compile_cache(checkpoint: Checkpoint, settings: Settings) -> CompileCache:
    """The cache with everything that decides what `_compiled` returns."""
    assert checkpoint.source is not None
    return CompileCache(
        checkpoint.source,
        settings.target,
        name=checkpoint.name,
        config=checkpoint.config.to_json_string(use_diff=False),
        pipeline=settings.pipeline.dump(),
        settings=f"{settings.dtype} {settings.context} {settings.cache_dtype} {settings.chunks}",
        kernels=str([(name, kernel.missing()) for name, kernel in available_kernels().items()]),
    )


SMALL_BYTES = 8 << 20
"""A region with fewer bytes of weights than this gains nothing from a second thread of torch."""


def torch_threads(plan: Plan, target: Target) -> int:
    """How many threads torch should use beside our kernels: one where every region it runs on the CPU is small.

    torch's threads wait for each other spinning; on a busy machine each wait can cost a whole tick of the scheduler.
    """
    largest = max((r.nbytes for r in plan.rows if r.kernel == "reference" and r.device == target.host.name), default=0)
    return 1 if largest < SMALL_BYTES else target.host.threads or default_threads()


def _pool_devices(gm: fx.GraphModule, target: Target) -> list[torch.device]:
    pools = {n.meta["input"]: n.meta["device"] for n in gm.graph.nodes if n.op == "placeholder" and n.meta.get("state")}
    ordered = sorted(pools, key=lambda name: int(name.split(".")[2]))
    return [target[pools[name]].torch for name in ordered]
