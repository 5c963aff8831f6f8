"""Requests and answers of the fine-tuning endpoints."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tinyoai.finetune.job_store import Status

ModelId = Annotated[int, Meta(ge=1, description="The model to train: its `model_id` in `GET /v1/models`")]
ModelName = Annotated[
    str, Meta(min_length=1, max_length=512, description="The model to train, by name; instead of `model_id`")
]
NewName = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=512,
        description="Name of the new model; by default the model's with `-tuned`",
    ),
]
Dataset = Annotated[
    Annotated[str, Meta(min_length=1, max_length=1024)] | Annotated[list[dict[str, Any]], Meta(min_length=1)],
    Meta(
        description="The examples themselves, or the name of a JSON Lines file in the folder `datasets` of the data "
        "directory"
    ),
]
Epochs = Annotated[int, Meta(ge=1, le=1000, description="Passes over all examples; 3 by default")]
BatchSize = Annotated[int, Meta(ge=1, le=256, description="Examples in a step; 4 by default")]
LearningRate = Annotated[float, Meta(gt=0, le=1, description="Peak learning rate; 0.0002 by default")]
UseLora = Annotated[
    bool, Meta(description="false trains the matrices themselves, which takes more memory; true by default")
]
LoraRank = Annotated[int, Meta(ge=1, le=256, description="Rank of the LoRA adapters; 16 by default")]
LoraAlpha = Annotated[
    int, Meta(ge=1, le=4096, description="Adapters are scaled by `lora_alpha` / `lora_r`; 32 by default")
]
MaxLength = Annotated[
    int,
    Meta(ge=8, le=8192, description="Tokens of an example; longer ones are cut at their end; 512 by default"),
]
Seed = Annotated[
    int, Meta(ge=0, le=2**31 - 1, description="Seed of the adapters and the order; 0 by default")
]

Started = Annotated[float | None, Meta(description="Unix seconds; null: not yet")]
Ended = Annotated[float | None, Meta(description="Unix seconds of the end, success or not; null: not yet")]
Loss = Annotated[float, Meta(description="Mean over the learned tokens of a step, in nats")]
Samples = Annotated[int | None, Meta(description="An example has one sample for each answer in it")]
SamplesCut = Annotated[int | None, Meta(description="Samples longer than `max_length`")]


class FinetuneRequest(Struct, kw_only=True):
    """The body of POST /api/finetune/start."""

    model_id: ModelId | None = None
    model: ModelName | None = None
    dataset: Dataset
    name: NewName | None = None
    epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate: LearningRate | None = None
    use_lora: UseLora | None = None
    lora_r: LoraRank | None = None
    lora_alpha: LoraAlpha | None = None
    max_length: MaxLength | None = None
    seed: Seed | None = None


class FinetuneConfig(Struct, kw_only=True):
    """The training configuration of a job."""

    epochs: int
    batch_size: int
    learning_rate: float
    use_lora: bool
    lora_r: int
    lora_alpha: int
    max_length: int
    seed: int


class FinetuneStarted(Struct, kw_only=True):
    """The answer of POST /api/finetune/start."""

    job_id: int
    status: Status
    model: str
    name: Annotated[
        str, Meta(description="Name of the new model, which can be used once the job is completed")
    ]
    dataset: str
    examples: int
    config: FinetuneConfig


class FinetuneJob(Struct, kw_only=True):
    """One job."""

    id: int
    status: Status
    model: str
    model_id: int | None
    name: str
    dataset: str
    created_at: Annotated[float, Meta(description="Unix seconds")]
    started_at: Started
    completed_at: Ended
    current_step: int
    current_epoch: float
    total_steps: int | None
    loss: Loss | None
    error: str | None
    resulting_model_id: int | None


class FinetuneJobs(Struct, kw_only=True):
    """The answer of GET /api/finetune/jobs, the newest first."""

    object: Literal["list"] = "list"
    jobs: list[FinetuneJob]


class FinetuneMetric(Struct, kw_only=True):
    """One step of a learning curve."""

    step: int
    epoch: float
    loss: Loss
    learning_rate: float
    tokens: Annotated[int, Meta(description="Learned tokens")]


class FinetuneStatus(FinetuneJob, kw_only=True):
    """The answer of GET /api/finetune/status/{job_id}."""

    config: FinetuneConfig
    examples: int | None
    samples: Samples
    samples_cut: SamplesCut
    trained_parameters: int | None
    seconds_left: float | None
    metrics: list[FinetuneMetric]
    log: list[str]


class FinetuneStopped(Struct, kw_only=True):
    """The answer of POST /api/finetune/stop/{job_id}: the job's new state."""

    job_id: int
    status: Status
