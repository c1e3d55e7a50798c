"""What the server counts, as Prometheus takes it: vLLM's names behind `ktrans:`. Labels are fixed: no text in them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ktcompile.request import Finished
from ktcompile.server.state import State

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Of one server: `finished` tells of each request, `text` is what is scraped."""

    def __init__(self, state: State) -> None:
        self.state, self.registry = state, CollectorRegistry()
        self.registry.register(self)

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(f"ktrans:{name}", what, buckets=SECONDS, registry=self.registry)

        self.first = histogram("time_to_first_token_seconds", "From the submission of a request to its first token.")
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of an answer, its mean.")
        self.whole = histogram("e2e_request_latency_seconds", "From the submission of a request to its last token.")

    def finished(self, event: Finished) -> None:
        """A request has ended. What failed or was cancelled before its first token has no times."""
        usage = event.usage
        if not usage.first_token_ms:
            return
        self.first.observe(usage.first_token_ms / 1e3)
        self.whole.observe((usage.first_token_ms + usage.predicted_ms) / 1e3)
        if usage.completion_tokens > 1:
            self.between.observe(usage.predicted_ms / 1e3 / (usage.completion_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """The engine's own counts; nothing while the model loads."""
        if self.state.engine is None:
            return
        now, work = self.state.engine.statistics, self.state.engine.model.work()
        for name, what, value in (
            ("num_requests_running", "Requests that are answered.", now.running),
            ("num_requests_waiting", "Requests that wait.", now.waiting),
            ("kv_cache_usage_perc", "Part of the cache's pages that requests have, 0 to 1.", now.used / now.pages),
        ):
            yield GaugeMetricFamily(f"ktrans:{name}", what, value)
        for name, what, count in (
            ("prompt_tokens", "Tokens of prompts that were answered, those found in the cache too.", now.prompts),
            ("prefix_cache_hits", "Tokens of prompts that were found in the cache.", now.reused),
            ("generation_tokens", "Tokens of answers.", now.said),
            ("num_preemptions", "Requests that had to be read again.", now.preempted),
            ("step_seconds", "Seconds of the engine's steps.", now.step_s),
            ("model_seconds", "Of these, seconds of the model.", now.model_s),
            ("cpu_moe_seconds", "Seconds in which the CPU computed routed experts.", work.cpu_moe_s),
            ("gpu_seconds", "Seconds of steps on the GPU, waiting for the CPU's experts included.", work.gpu_s),
            ("expert_bytes_read", "Bytes of packed experts that the CPU read.", work.expert_bytes),
        ):
            if count is None:  # there is no GPU
                continue
            yield CounterMetricFamily(f"ktrans:{name}", what, count)
        ended = CounterMetricFamily("ktrans:request_success", "Requests by how they ended.", labels=["finished_reason"])
        for reason, count in now.finished:
            ended.add_metric([reason], count)
        yield ended

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


__all__ = ["SECONDS", "Metrics"]
