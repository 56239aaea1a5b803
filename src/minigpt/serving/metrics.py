"""What Prometheus is told (https://prometheus.io/docs/practices/naming/)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = made = CollectorRegistry()
        self.requests = Counter(
            "minigpt_requests", "Completions, by model and HTTP status", ["model", "status"],
            registry=made,
        )  # fmt: skip
        self.tokens = Counter(
            "minigpt_tokens", "Tokens of prompts and of texts", ["model", "kind"], registry=made
        )
        self.latency = Histogram(
            "minigpt_request_seconds", "From a request to the end of its answer", ["model"],
            buckets=_SECONDS, registry=made,
        )  # fmt: skip
        self.first_token = Histogram(
            "minigpt_first_token_seconds", "From a request to its first token", ["model"],
            buckets=_SECONDS, registry=made,
        )  # fmt: skip
        self.rows = Histogram(
            "minigpt_step_texts", "Texts that a call writes tokens of", ["model"],
            buckets=_ROWS, registry=made,
        )  # fmt: skip
        self.waiting = Gauge(
            "minigpt_waiting_requests", "Requests without a slot", ["model"], registry=made
        )
        self.disconnected = Counter(
            "minigpt_disconnected", "Requests whose client went away", ["model"], registry=made
        )
        self.failures = Counter(
            "minigpt_load_failures", "Versions that could not be loaded", ["model"], registry=made
        )
        self.version = Info("minigpt_model", "What serves a model", ["model"], registry=made)

    def page(self) -> bytes:
        """Returns all of them in Prometheus's text format."""
        return generate_latest(self._registry)
