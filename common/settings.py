"""Every setting of Tunery, and the only module that reads the environment.

A deployment differs from the embedded stack in values, never in branches: after this module no code asks which it is.
"""

from __future__ import annotations

import ipaddress
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from common.errors import InvalidInput

PREFIX = "TUNERY_"

CommaList = Annotated[list[str], NoDecode]


class Settings(BaseSettings):
    """Settings of the server processes: API, workers, sweeper, migrations. Sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    database_url: str = Field("", description="SQLAlchemy URL: `postgresql+psycopg://…` or `sqlite:////path`.")
    broker_url: SecretStr = Field(SecretStr(""), description="Celery broker: `redis://…`, `amqp://…`.")
    broker_prefix: str = Field("tunery", description="Prefix of every key on the broker, so that it can be shared.")

    s3_endpoint_url: str | None = Field(None, description="S3 endpoint; empty means AWS.")
    s3_public_url: str | None = Field(None, description="Host in signed links, where clients see another address.")
    s3_region: str = Field("us-east-1", description="Region that requests are signed for.")
    s3_bucket: str = Field("tunery", description="Bucket for uploads, checkpoints and artifacts.")
    s3_access_key_id: str | None = Field(None, description="Access key; empty means boto3's own lookup.")
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret of that key.")
    link_s: int = Field(900, ge=10, le=604800, description="Life of a signed link.")

    dataset_buckets: CommaList = Field([], description="Buckets that `s3://` dataset URIs may name (comma-separated).")
    local_datasets: Path | None = Field(None, description="Folder that `file://` dataset URIs may name; empty: none.")
    model_dir: Path | None = Field(None, description="Folder of base models that are named without a `/`.")
    hf_endpoint: str = Field("https://huggingface.co", description="Hub that `org/name` and `hf://` are fetched from.")
    hf_token: SecretStr | None = Field(
        None, description="The operator's hub token; handed to the fetching process only."
    )
    hf_cache: Path | None = Field(None, description="Folder for downloaded base models; empty: under the work folder.")
    fetch_networks: CommaList = Field(
        [], description="Private networks (CIDR) that dataset URLs and webhooks may reach."
    )
    ca_bundle: Path | None = Field(
        None, description="CA certificates for dataset URLs and webhooks; empty means the system's."
    )

    repeat_window_s: float = Field(
        30,
        ge=0,
        le=3600,
        description="The same create by the same key within so long gets the same job; 0: another.",
    )
    max_upload_bytes: int = Field(512 * 2**20, ge=1, description="Largest upload through `POST /datasets`.")
    upload_part_bytes: int = Field(
        16 * 2**20,
        ge=5 * 2**20,
        le=5 * 2**30,
        description="Size of the parts of an upload that goes straight to S3; more where that would be over 10,000.",
    )
    upload_idle_s: float = Field(
        86_400, gt=0, description="An upload straight to S3 is given up when its client has not asked for so long."
    )
    max_unfinished_uploads: int = Field(
        20, ge=1, description="Uploads in parts that a tenant may have begun and not ended, of both kinds together."
    )
    max_dataset_bytes: int = Field(
        8 * 2**30, ge=1, description="Largest dataset that is fetched or uploaded in parts, and decoded."
    )
    max_row_bytes: int = Field(4 * 2**20, ge=1, description="Longest row of a dataset.")
    max_rows: int = Field(10_000_000, ge=1, description="Most rows of a dataset.")

    lease_s: float = Field(120, gt=0, description="Life of a worker's lease on a job; renewed every eighth of it.")
    retry_max_s: float = Field(60, ge=0, description="Longest pause before a job is tried again after a fault.")
    crash_loop_attempts: int = Field(3, ge=1, description="Trainer crashes in a row, without a newer checkpoint.")
    progress_deadline_s: float = Field(1800, gt=0, description="A trainer that says nothing for so long is hung.")
    stop_grace_s: float = Field(60, gt=0, description="Time for a trainer's checkpoint on a drain or pause.")
    preflight_timeout_s: float = Field(600, gt=0, description="Longest run of a preflight check.")
    preflight_memory_bytes: int = Field(8 * 2**30, ge=2**28, description="Address space of a preflight check.")
    disk_reserve_bytes: int = Field(2**30, ge=0, description="Free disk that a worker wants before it takes a job.")

    collect_after_s: float = Field(
        86_400, ge=0, description="Objects that no row names are removed when they are so old; 0 keeps them."
    )

    work_dir: Path = Field(Path(".tunery/work"), description="Folder for jobs that a worker is running.")
    trainer_module: str = Field("worker.trainer", description="Module that is started as the trainer process.")
    preflight_module: str = Field("worker.trainer.check", description="Module that is started as the preflight check.")
    warm_base_s: float = Field(
        300,
        ge=0,
        description="A trainer keeps its base in memory so long for a next job that wants it; 0: not at all.",
    )
    quantized_cache_gib: float = Field(
        64,
        ge=0,
        description="Disk for bases in 4 bit, under the work folder: the next cold start reads them; 0: none are kept.",
    )
    trainer_threads: int = Field(0, ge=0, description="CPU threads of a trainer; 0: the cores of the machine.")
    device: str = Field("auto", description="`auto`, `cpu` or `cuda:N`: where this worker's trainer runs.")
    worker_name: str = Field("", description="Name of this worker in lists; empty: host and process id.")

    serve_host: str = Field("127.0.0.1", description="Address that `tunery serve` listens on.")
    serve_port: int = Field(8001, ge=0, le=65535, description="Port that `tunery serve` listens on.")
    serve_max_adapters: int = Field(16, ge=1, description="Adapters that `tunery serve` holds beside its base.")
    serve_max_adapter_bytes: int = Field(4 * 2**30, ge=1, description="Memory that these adapters may take together.")
    serve_max_rows: int = Field(8, ge=1, description="Answers that are written together, in one batch.")
    serve_max_batch_tokens: int = Field(65_536, ge=1, description="Most tokens of such a batch, padding included.")
    serve_max_tokens: int = Field(4096, ge=1, description="Longest answer, in tokens.")
    serve_max_waiting: int = Field(
        64, ge=1, description="Requests that may wait or be answered at the same time; three quarters of one tenant."
    )
    serve_stall_s: float = Field(300, gt=0, description="A model that says nothing for so long is started again.")

    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port that the API listens on.")
    data_dir: Path = Field(Path(".tunery"), description="Data directory of `tunery up`.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")

    @field_validator("dataset_buckets", "fetch_networks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("fetch_networks")
    @classmethod
    def _networks(cls, value: list[str]) -> list[str]:
        for network in value:
            ipaddress.ip_network(network)
        return value

    @field_validator(
        "s3_endpoint_url",
        "s3_public_url",
        "local_datasets",
        "model_dir",
        "hf_cache",
        "ca_bundle",
        "s3_access_key_id",
        "s3_secret_access_key",
        "hf_token",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        # docker-compose passes an unset variable as an empty string.
        return None if value == "" else value


@cache
def load() -> Settings:
    """Return the settings of this process, read from the environment once.

    Raises:
        InvalidInput: a variable is wrong; the message names it.
    """
    try:
        return Settings()
    except ValidationError as error:
        wrong = "; ".join(f"{PREFIX}{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors())
        raise InvalidInput(wrong, code="bad_setting", hint="docs/settings.md lists what each takes.") from None


def trainer_environment() -> dict[str, str]:
    """Return the environment for processes that run model code: what they need to start, and no credential.

    An allow-list, because a deny-list would let through the next secret that somebody invents.
    """
    keep = (
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "TZ",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "NVIDIA_VISIBLE_DEVICES",
        "TRITON_CACHE_DIR",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "MKL_NUM_THREADS",
    )
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # Threads that spin while they wait cost a factor of three to seven where the cores are shared (two cores, three
    # trainers: 7 s became 22 to 47 s).
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # pyarrow 26's own allocator reserves a gigabyte of addresses at its first use, of those that a check may have.
    # Steps differ in tokens: on a card, blocks of fixed sizes would leave a tenth of its memory in fragments.
    frugal = {"ARROW_DEFAULT_MEMORY_POOL": "system", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    return quiet | frugal | environment | offline


def visible_cards() -> list[str] | None:
    """Return the cards that CUDA_VISIBLE_DEVICES leaves to this process, or None where it does not say."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [card.strip() for card in value.split(",") if card.strip()]


def child_environment(values: dict[str, str]) -> dict[str, str]:
    """Return this process's environment with `values` laid over it: for the children of `tunery up`."""
    return {**os.environ, **values}


def client_address() -> tuple[str | None, str | None, Path]:
    """Return what points a client at a server: `TUNERY_URL`, `TUNERY_API_KEY`, and the data directory to look in."""
    data_dir = Path(os.environ.get(f"{PREFIX}DATA_DIR") or ".tunery")
    return os.environ.get(f"{PREFIX}URL") or None, os.environ.get(f"{PREFIX}API_KEY") or None, data_dir
