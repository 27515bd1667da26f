"""The same figures for Prometheus; the door to its client."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dashboard.watched import Watched

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STORE = {
    "records": ("sdxl_store_records", "Records in the store."),
    "file_bytes": ("sdxl_store_file_bytes", "Bytes of data.mdb."),
    "used_bytes": ("sdxl_store_used_bytes", "Bytes of data.mdb that hold something."),
}
SERVICE = {
    "done": ("sdxl_build_done", "Steps of the build's phase that are done."),
    "total": ("sdxl_build_total", "Steps of the build's phase."),
    "images_per_s": ("sdxl_build_images_per_second", "Rate of the build."),
    "changed": ("sdxl_service_changed_paths", "Paths that changed since the last build began, and wait for the next."),
    "builds": ("sdxl_service_builds", "Builds since the service started."),
    "beat_s": ("sdxl_service_beat_timestamp_seconds", "When the service last said that it works."),
    "quarantined": ("sdxl_quarantined_pictures", "Pictures that the last build set aside."),
}
RUN = {
    "step": ("sdxl_run_step", "Optimizer steps taken."),
    "steps": ("sdxl_run_steps", "Optimizer steps that training ends at."),
    "loss": ("sdxl_run_loss", "Mean training loss at the last log point."),
    "learning_rate": ("sdxl_run_learning_rate", "Learning rate at the last log point."),
    "steps_per_s": ("sdxl_run_steps_per_second", "Speed over the last log points."),
    "data_wait_share": ("sdxl_run_data_wait_share", "Share of the time spent waiting for data."),
    "skipped": ("sdxl_run_skipped_steps", "Steps whose gradients were not finite."),
}


def metrics_text(watched: Watched) -> bytes:
    """All figures in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(watched))
    return generate_latest(registry)


class _Figures(Collector):
    """What is known at the moment that it is asked for."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Every figure that is known; what is not known is left out."""
        status = self._watched.status()
        store, service = status["store"], status["service"] or {}
        yield from _plain(store, STORE)
        yield GaugeMetricFamily("sdxl_store_is_readable", "1 where the store can be read.", not store["why"])
        yield GaugeMetricFamily("sdxl_store_writer", "1 while a process writes the store.", store["writer"] is not None)
        yield GaugeMetricFamily(
            "sdxl_bad_records", "Records set aside and not encoded anew.", len(store["bad_records"])
        )
        samples = GaugeMetricFamily("sdxl_manifest_samples", "Samples of a current manifest.", labels=["manifest"])
        for one in store["data"]:
            samples.add_metric([one["name"]], one["samples"])
        yield samples
        yield GaugeMetricFamily("sdxl_service_up", "1 while the service runs.", bool(service.get("is_alive")))
        yield from _plain(service, SERVICE)
        if service.get("total") is not None and service.get("done") is not None:
            waiting = max(0.0, service["total"] - service["done"])
            about = "Of the build's phase (pictures, captions), what is still to do."
            yield GaugeMetricFamily("sdxl_build_queue", about, waiting)
        if sealed := [one["sealed_s"] for one in store["manifests"] if one["sealed_s"] is not None]:
            about = "When a manifest was sealed last, by the service or by hand."
            yield GaugeMetricFamily("sdxl_last_seal_timestamp_seconds", about, max(sealed))
        yield from self._of_runs()

    def _of_runs(self) -> Iterator[GaugeMetricFamily]:
        runs = self._watched.runs()["runs"]
        for field, (name, about) in RUN.items():
            family = GaugeMetricFamily(name, about, labels=["run", "expert"])
            for run in runs:
                if run[field] is not None:
                    family.add_metric([run["folder"], run["name"]], run[field])
            yield family
        training = GaugeMetricFamily("sdxl_run_is_training", "1 while a process trains it.", labels=["run", "expert"])
        for run in runs:
            training.add_metric([run["folder"], run["name"]], run["state"] in ("training", "starting"))
        yield training


def _plain(values: dict[str, Any], fields: dict[str, tuple[str, str]]) -> Iterator[GaugeMetricFamily]:
    for field, (name, about) in fields.items():
        if values.get(field) is not None:
            yield GaugeMetricFamily(name, about, values[field])
