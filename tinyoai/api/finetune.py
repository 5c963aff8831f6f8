"""The endpoints about fine-tuning: starting a job, seeing how it goes, ending it.

Owns those requests' meaning and those answers' wording, and what a finished job's file becomes: a registered
model with its parent's settings. It must not know how training works.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from tinyoai import errors, gguf
from tinyoai.api import generation, schema
from tinyoai.finetune import dataset
from tinyoai.finetune.jobs import INSTALL, Job, Jobs, installed
from tinyoai.finetune.train_config import Order, Spec, memory_needed
from tinyoai.host import atomic, memory
from tinyoai.models.catalog import Settings
from tinyoai.models.pool import Pool
from tinyoai.models.registry import Model, RegistryError
from tinyoai.web.exchange import Exchange

MAX_NAME_BYTES = 200
"""Of a new model: its file has the same name."""


class Finetunes:
    """The endpoints."""

    def __init__(self, pool: Pool, home: str, chat_template: str) -> None:
        self._pool = pool
        self._template = chat_template
        self.jobs = Jobs(home, self._made)

    async def start(self, exchange: Exchange) -> None:
        """Begins a job, or has it wait for its turn. Raises errors.ApiError for all that can be refused."""
        request = schema.finetune_request(await exchange.read_body())
        if not installed():
            raise errors.NotFound(
                f"this installation does not train: {INSTALL}, and start the server again",
                code="finetune_not_installed",
            )
        await self._pool.look()
        await self.jobs.opened()
        model = self._model(request)
        spec = _spec(request)
        _check_memory(model, spec)
        self._name(request, model)
        try:
            given, label = await asyncio.to_thread(self._examples, request)
        except dataset.DatasetError as error:
            raise errors.BadRequest(f"dataset: {error}", param="dataset") from None
        name = self._name(request, model)  # once more: from here to the job nobody can take it
        order = Order(
            path=model.path,
            template=self._template if self._template != "auto" else model.template,
            chat=model.kind == "chat",
            out=str(self.jobs.place(name)),
            spec=spec,
        )
        job = await self.jobs.start(
            order, given, model=model.name, model_id=model.id or None, name=name, dataset=label
        )
        body = schema.FinetuneStarted(
            job_id=job.id,
            status=job.status,
            model=job.model,
            name=job.name,
            dataset=job.dataset,
            examples=len(given),
            config=_config(spec),
        )
        exchange.respond(200, generation.encode(body))

    async def all(self, exchange: Exchange) -> None:
        """All jobs, the newest first."""
        rows = [schema.FinetuneJob(**_row(job)) for job in self.jobs.all()]
        exchange.respond(200, generation.encode(schema.FinetuneJobs(jobs=rows)))

    async def status(self, exchange: Exchange) -> None:
        """One job with its learning curve and its log. Raises errors.NotFound."""
        job = self._job(exchange)
        metrics, lines = await asyncio.to_thread(lambda: (self.jobs.metrics(job), self.jobs.lines(job)))
        ran = job.running
        body = schema.FinetuneStatus(
            **_row(job),
            config=_config(job.spec),
            examples=ran.n_examples if ran is not None else None,
            samples=ran.n_samples if ran is not None else None,
            samples_cut=ran.n_cut if ran is not None else None,
            trained_parameters=ran.n_trained if ran is not None else None,
            seconds_left=_seconds_left(job),
            metrics=[
                schema.FinetuneMetric(
                    step=step.step,
                    epoch=step.epoch,
                    loss=step.loss,
                    learning_rate=step.learning_rate,
                    tokens=step.n_tokens,
                )
                for step in metrics
            ],
            log=lines,
        )
        exchange.respond(200, generation.encode(body))

    async def stop(self, exchange: Exchange) -> None:
        """Ends a job; one that has ended stays as it is. Raises errors.NotFound."""
        job = self._job(exchange)
        await self.jobs.stop(job)
        exchange.respond(200, generation.encode(schema.FinetuneStopped(job_id=job.id, status=job.status)))

    # -- what is asked for -----------------------------------------------------------------------

    def _job(self, exchange: Exchange) -> Job:
        text = exchange.route_params["job_id"]
        job = self.jobs.find(int(text)) if text.isascii() and text.isdecimal() and len(text) < 19 else None
        if job is None:
            raise errors.NotFound(f"there is no fine-tuning job {text[:40]!r}; see GET /api/finetune/jobs")
        return job

    def _model(self, request: schema.FinetuneRequest) -> Model:
        catalog = self._pool.catalog
        if request.model is not None:
            model = catalog.lookup(request.model)
            if request.model_id is not None and request.model_id != model.id:
                raise errors.BadRequest(
                    f"model_id: {request.model!r} has the number {model.id}; send one of the two",
                    param="model_id",
                )
        elif request.model_id is not None:
            found = [model for model in catalog.view.models.values() if model.id == request.model_id]
            if not found:
                raise errors.ModelNotFound(
                    f"there is no model with the number {request.model_id}; "
                    "GET /v1/models has each one's as model_id",
                    param="model_id",
                )
            model = found[0]
        else:
            raise errors.BadRequest("the field 'model_id' (or 'model', a name) is required", param="model_id")
        if model.architecture != "llama" or model.shape is None:
            what = model.architecture or "unknown"
            raise errors.BadRequest(
                f"{model.name!r} cannot be trained: its architecture is {what}, and GGUF files of llama can",
                param="model" if request.model is not None else "model_id",
            )
        return model

    def _name(self, request: schema.FinetuneRequest, model: Model) -> str:
        view = self._pool.catalog.view
        known = (view.models, view.missing, view.broken, view.aliases)
        making = {self.jobs.place(name) for name in self.jobs.names()}  # a/b and a__b have the same file

        def taken(name: str) -> bool:
            place = self.jobs.place(name)
            return any(name in names for names in known) or place in making or os.path.lexists(place)

        if request.name is None:
            tuned, count = f"{model.name}-tuned", 1
            while taken(tuned):
                count += 1
                tuned = f"{model.name}-tuned-{count}"
        else:
            tuned = request.name
        if not tuned.isprintable() or len(tuned.encode("utf-8", "replace")) > MAX_NAME_BYTES:
            raise errors.BadRequest(f"name: take at most {MAX_NAME_BYTES} printable characters", param="name")
        if taken(tuned):
            raise errors.BadRequest(
                f"name: there is a model {tuned!r} already, or the file of one that was; choose another",
                param="name",
            )
        return tuned

    def _examples(self, request: schema.FinetuneRequest) -> tuple[list[dataset.Example], str]:
        """In a thread: what is to be learnt, and what it is called."""
        if isinstance(request.dataset, str):
            return dataset.parse(dataset.read(self.jobs.datasets, request.dataset)), request.dataset
        return dataset.parse(msgspec.json.encode(request.dataset)), "sent with the request"

    # -- what comes of it ------------------------------------------------------------------------

    async def _made(self, job: Job, path: Path) -> int:
        """A job's file has become a model. Raises RegistryError."""
        parent = self._pool.catalog.view.models.get(job.model)
        settings = Settings()
        if parent is not None:
            settings = Settings(
                kind=parent.kind,
                template=parent.template,
                context=parent.own_context,
                defaults=parent.defaults,
            )

        def register() -> int:
            atomic.replace(path.with_suffix(".json"), msgspec.json.encode(settings))
            return self._pool.catalog.add(job.name, path)

        try:
            return await asyncio.to_thread(register)
        except (OSError, gguf.BadModelFile) as error:
            raise RegistryError(str(error)) from None


def _spec(request: schema.FinetuneRequest) -> Spec:
    asked = {name: getattr(request, name) for name in Spec.__struct_fields__}
    return Spec(**{name: value for name, value in asked.items() if value is not None})


def _check_memory(model: Model, spec: Spec) -> None:
    assert model.shape is not None
    needed, room = memory_needed(model.parameters, model.shape, spec), memory.available()
    if room is not None and needed > room:
        raise errors.InsufficientMemory(
            f"training {model.name!r} needs about {needed / 1e6:.0f} MB, and {room / 1e6:.0f} MB can be had; take a "
            "smaller batch_size or max_length, or a smaller model"
        )


def _config(spec: Spec) -> schema.FinetuneConfig:
    return schema.FinetuneConfig(**structs.asdict(spec))


def _row(job: Job) -> dict[str, Any]:
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
        "current_step": job.last.step if job.last is not None else 0,
        "current_epoch": job.last.epoch if job.last is not None else 0.0,
        "total_steps": job.running.n_steps if job.running is not None else None,
        "loss": job.last.loss if job.last is not None else None,
        "error": job.error,
        "resulting_model_id": job.result_id,
    }


def _seconds_left(job: Job) -> float | None:
    """What the steps so far say of the rest; None where nothing runs."""
    ran, last = job.running, job.last
    if job.status != "running" or ran is None or last is None or last.step <= ran.from_step + 1:
        return None
    # the first step's time is not told: `seconds` counts from before it
    return round((ran.n_steps - last.step) * last.seconds / (last.step - ran.from_step), 1)
