"""The fine-tuning endpoints: start, list, status and stop.

A finished job's file is registered as a model with the settings of the model it was trained from.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from tinyoai import errors, gguf
from tinyoai.api.decode import decode, encode
from tinyoai.api.finetune_types import (
    FinetuneConfig,
    FinetuneJob,
    FinetuneJobs,
    FinetuneMetric,
    FinetuneRequest,
    FinetuneStarted,
    FinetuneStatus,
    FinetuneStopped,
)
from tinyoai.engine import facts
from tinyoai.finetune import dataset
from tinyoai.finetune.job_store import TrainingJob
from tinyoai.finetune.jobs import INSTALL, Jobs, installed
from tinyoai.finetune.protocol import JobSpec
from tinyoai.finetune.train_config import TrainConfig, memory_needed
from tinyoai.host import atomic, memory
from tinyoai.models import template_file
from tinyoai.models.catalog import Settings
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Model, RegistryError
from tinyoai.text import chat_format
from tinyoai.web.exchange import Exchange

TRAINING_ENGINE = "ctransformers"
"""The trainer uses this engine's tokenizer and computes what it computes, and so it serves what was trained."""
MAX_NAME_BYTES = 200
"""Limit of a new model's name, because its file has the same name."""


class Finetunes:
    """The endpoints."""

    def __init__(self, pool: Pool, home: str, chat_template: str) -> None:
        self._pool = pool
        self._template = chat_template
        self.jobs = Jobs(home, self._register)

    async def start(self, exchange: Exchange) -> None:
        """Add a job to the queue. Raises errors.ApiError if the request is refused."""
        request = decode(FinetuneRequest, await exchange.read_body())
        if not installed():
            raise errors.NotFound(
                f"fine-tuning is not installed: run {INSTALL} and restart the server",
                code="finetune_not_installed",
            )
        await self.jobs.acquire()
        await self._pool.rescan()
        model = self._model(request)
        reason = await asyncio.to_thread(_untrainable, model)
        if reason:
            raise errors.BadRequest(
                f"{model.name!r} cannot be trained: {reason}",
                param="model" if request.model is not None else "model_id",
            )
        config = _train_config(request)
        _check_memory(model, config)
        self._new_name(request, model)
        try:
            examples, label = await asyncio.to_thread(self._examples, request)
        except dataset.DatasetError as error:
            raise errors.BadRequest(f"dataset: {error}", param="dataset") from None
        name = self._new_name(request, model)  # again: nothing awaits from here until the job has the name
        template = self._template if self._template != "auto" else model.template
        if template_file.is_file(template):
            raise errors.BadRequest(
                "this model's chat template is a Jinja file, and training knows named formats only; name one with "
                f"--chat-template: {', '.join(chat_format.NAMES)}",
                param="model",
            )
        spec = JobSpec(
            path=model.path,
            template=template,
            chat=model.kind == "chat",
            out=str(self.jobs.model_path(name)),
            config=config,
        )
        job = await self.jobs.start(
            spec, examples, model=model.name, model_id=model.id or None, name=name, dataset=label
        )
        body = FinetuneStarted(
            job_id=job.id,
            status=job.status,
            model=job.model,
            name=job.name,
            dataset=job.dataset,
            examples=len(examples),
            config=_config(config),
        )
        exchange.respond(200, encode(body))

    async def all(self, exchange: Exchange) -> None:
        """All jobs, the newest first."""
        await self.jobs.refresh()
        rows = [FinetuneJob(**_row(job)) for job in self.jobs.all()]
        exchange.respond(200, encode(FinetuneJobs(jobs=rows)))

    async def status(self, exchange: Exchange) -> None:
        """One job with its learning curve and its log. Raises errors.NotFound."""
        job, store = await self._job(exchange), self.jobs.store
        curve, log = await asyncio.to_thread(lambda: (store.curve(job), store.log_lines(job.id)))
        training = job.training
        body = FinetuneStatus(
            **_row(job),
            config=_config(job.config),
            examples=training.n_examples if training is not None else None,
            samples=training.n_samples if training is not None else None,
            samples_cut=training.n_cut if training is not None else None,
            trained_parameters=training.n_trained if training is not None else None,
            seconds_left=_seconds_left(job),
            metrics=[
                FinetuneMetric(
                    step=step.step,
                    epoch=step.epoch,
                    loss=step.loss,
                    learning_rate=step.learning_rate,
                    tokens=step.n_tokens,
                )
                for step in curve
            ],
            log=log,
        )
        exchange.respond(200, encode(body))

    async def stop(self, exchange: Exchange) -> None:
        """Stop a job; one that has ended stays as it is. Raises errors.NotFound or errors.BadRequest."""
        job = await self._job(exchange)
        job = await self.jobs.stop(job.id) or job
        exchange.respond(200, encode(FinetuneStopped(job_id=job.id, status=job.status)))

    # -- requests -----------------------------------------------------------------------------------

    async def _job(self, exchange: Exchange) -> TrainingJob:
        await self.jobs.refresh()
        text = exchange.route_params["job_id"]
        job = self.jobs.find(int(text)) if text.isascii() and text.isdecimal() and len(text) < 19 else None
        if job is None:
            raise errors.NotFound(f"fine-tuning job {text[:40]!r} not found; see GET /api/finetune/jobs")
        return job

    def _model(self, request: FinetuneRequest) -> Model:
        catalog = self._pool.catalog
        if request.model is not None:
            model = catalog.lookup(request.model)
            if request.model_id is not None and request.model_id != model.id:
                raise errors.BadRequest(
                    f"model_id: the model_id of {request.model!r} is {model.id}; send only one of the two",
                    param="model_id",
                )
        elif request.model_id is not None:
            found = [model for model in catalog.view.models.values() if model.id == request.model_id]
            if not found:
                raise errors.ModelNotFound(
                    f"no model has the model_id {request.model_id}; GET /v1/models lists them",
                    param="model_id",
                )
            model = found[0]
        else:
            raise errors.BadRequest("the field 'model_id' (or 'model', a name) is required", param="model_id")
        return model

    def _new_name(self, request: FinetuneRequest, model: Model) -> str:
        view = self._pool.catalog.view
        known = (view.models, view.missing, view.broken, view.aliases)
        reserved = {self.jobs.model_path(name) for name in self.jobs.names()}  # a/b and a__b share a file

        def taken(name: str) -> bool:
            path = self.jobs.model_path(name)
            return any(name in names for names in known) or path in reserved or os.path.lexists(path)

        if request.name is None:
            name, count = f"{model.name}-tuned", 1
            while taken(name):
                count += 1
                name = f"{model.name}-tuned-{count}"
        else:
            name = request.name
        if not name.isprintable() or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
            raise errors.BadRequest(f"name: use at most {MAX_NAME_BYTES} printable characters", param="name")
        if taken(name):
            raise errors.BadRequest(
                f"name: the model {name!r} exists already, or its file does; choose another name",
                param="name",
            )
        return name

    def _examples(self, request: FinetuneRequest) -> tuple[list[dataset.Example], str]:
        """The examples and their label in the job. Blocks. Raises dataset.DatasetError."""
        if isinstance(request.dataset, str):
            return dataset.parse(dataset.read(self.jobs.datasets, request.dataset)), request.dataset
        return dataset.parse(msgspec.json.encode(request.dataset)), "sent with the request"

    # -- results ------------------------------------------------------------------------------------

    async def _register(self, job: TrainingJob, path: Path) -> int:
        """Register the file of a finished job as a model and return its id. Raises RegistryError."""
        parent = self._pool.catalog.view.models.get(job.model)
        settings = Settings(engine=TRAINING_ENGINE)
        if parent is not None:
            settings = Settings(
                kind=parent.kind,
                template=parent.template,
                engine=TRAINING_ENGINE,
                context=parent.n_ctx_override,
                defaults=parent.defaults,
            )

        def register() -> int:
            atomic.replace(path.with_suffix(".json"), msgspec.json.encode(settings))
            return self._pool.catalog.add(job.name, path)

        try:
            return await asyncio.to_thread(register)
        except (OSError, gguf.BadModelFile) as error:
            raise RegistryError(str(error)) from None


def _train_config(request: FinetuneRequest) -> TrainConfig:
    values = {name: getattr(request, name) for name in TrainConfig.__struct_fields__}
    return TrainConfig(**{name: value for name, value in values.items() if value is not None})


def _untrainable(model: Model) -> str:
    """Why a model cannot be trained; empty if it can. Blocks."""
    if model.architecture != "llama" or model.hparams is None:
        return (
            f"its architecture is {model.architecture or 'unknown'}; only GGUF files of llama can be trained"
        )
    try:
        reason = facts.ENGINES[TRAINING_ENGINE].supports(gguf.read_header(Path(model.path)))
    except (OSError, gguf.BadModelFile) as error:
        return str(error).replace(model.path, "its file")
    if reason is None:
        return ""
    why = reason.partition(";")[0]
    return f"only llama files that {TRAINING_ENGINE} runs can be trained, and this one {why}"


def _check_memory(model: Model, config: TrainConfig) -> None:
    assert model.hparams is not None
    needed, available = memory_needed(model.n_params, model.hparams, config), memory.available()
    if available is not None and needed > available:
        raise errors.InsufficientMemory(
            f"training {model.name!r} needs about {needed / 1e6:.0f} MB, and {available / 1e6:.0f} MB are available; "
            "use a smaller batch_size or max_length, or a smaller model"
        )


def _config(config: TrainConfig) -> FinetuneConfig:
    return FinetuneConfig(**structs.asdict(config))


def _row(job: TrainingJob) -> dict[str, Any]:
    step, training = job.last_step, job.training
    return {
        "id": job.id,
        "status": job.status,
        "model": job.model,
        "model_id": job.model_id,
        "name": job.name,
        "dataset": job.dataset,
        "created_at": job.created,
        "started_at": job.started,
        "completed_at": job.ended,
        "current_step": step.step if step is not None else 0,
        "current_epoch": step.epoch if step is not None else 0.0,
        "total_steps": training.n_steps if training is not None else None,
        "loss": step.loss if step is not None else None,
        "error": job.error,
        "resulting_model_id": job.result_id,
    }


def _seconds_left(job: TrainingJob) -> float | None:
    """The time that the remaining steps take at the speed so far; None if the job does not run."""
    training, step = job.training, job.last_step
    if job.status != "running" or training is None or step is None or step.step <= training.from_step + 1:
        return None
    return round((training.n_steps - step.step) * step.seconds / (step.step - training.from_step), 1)
