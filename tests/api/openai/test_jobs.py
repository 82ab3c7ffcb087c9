"""Jobs through the stock client, over a real API: what is asked, what is shown, what is refused."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from api.openai.job_create import JobCreate
from common.db.rows import JobRow
from common.jobs import lifecycle
from common.jobs.lifecycle import Event, Failure, MetricPoint
from common.schemas.jobs import JobSpec
from tests.api.conftest import BASE, Api, drive, finish
from tests.api.openai.conftest import Connect, conforms

ROWS = b'{"text": "a"}\n' * 3
SUPERVISED = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 6}}}


def upload(sdk: OpenAI, name: str = "train.jsonl") -> str:
    return sdk.files.create(file=(name, ROWS), purpose="fine-tune").id


def create(sdk: OpenAI, **fields: Any) -> Any:
    file = fields.pop("training_file", None) or upload(sdk)
    return conforms(sdk.fine_tuning.jobs.create(**{"model": BASE, "training_file": file, **fields}))


def native(api: Api, job_id: str) -> dict[str, Any]:
    with api.client() as client:
        return client.get(f"/jobs/{job_id}").json()


def run(api: Api, job_id: str) -> lifecycle.Claim:
    """Let a job train: two evaluations, a checkpoint at the first and at the last step."""
    claim = drive(api.context, job_id)
    points = [
        MetricPoint(1, {"loss": 3.0, "mean_token_accuracy": 0.25, "learning_rate": 2e-4}),
        MetricPoint(2, {"loss": 2.0, "mean_token_accuracy": 0.5}),
        MetricPoint(2, {"loss": 2.5, "mean_token_accuracy": 0.75, "perplexity": 12.0}, "eval"),
        MetricPoint(3, {"loss": 1.0}),
    ]
    with api.context.write() as session:
        note = Event("rows.truncated", "Some rows were cut.", "warning", {"rows": 1})
        progress = {"step": 3, "max_steps": 4, "eta_s": 100.0}
        lifecycle.advance(session, claim, progress=progress, events=[note], metrics=points)
        for step in (2, 4):
            lifecycle.checkpointed(session, claim, step=step, prefix="p/", manifest_sha256="0" * 64, num_bytes=9)
    return claim


def publish(api: Api, claim: lifecycle.Claim, **report: Any) -> None:
    finish(api.context, claim)
    with api.context.write() as session:
        session.execute(update(JobRow).where(JobRow.id == claim.job_id).values(report={"steps": 4, **report}))


def test_the_life_of_a_job(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    train, held_out = upload(sdk), upload(sdk, "valid.jsonl")
    before = int(time.time())
    made = create(sdk, training_file=train, validation_file=held_out, suffix="my-bot", metadata={"team": "a"}, seed=7,
                  method=SUPERVISED)  # fmt: skip
    assert (made.object, made.status, made.model, made.organization_id) == (
        "fine_tuning.job", "validating_files", BASE, "default"
    )  # fmt: skip
    assert (made.training_file, made.validation_file, made.seed) == (train, held_out, 7)
    assert made.metadata == {"team": "a"} and made.integrations == [] and made.result_files == []
    assert before <= made.created_at <= time.time()
    none = ("error", "fine_tuned_model", "finished_at", "trained_tokens", "estimated_finish")
    assert [getattr(made, name) for name in none] == [None] * 5
    assert made.hyperparameters.n_epochs == 2 == made.method.supervised.hyperparameters.n_epochs
    asked = native(any_api, made.id)["hyperparameters"]
    assert (asked["per_device_train_batch_size"], asked["gradient_accumulation_steps"]) == (3, 2)
    assert (asked["num_train_epochs"], asked["learning_rate"]) == (2.0, "auto")

    claim = run(any_api, made.id)
    running = conforms(sdk.fine_tuning.jobs.retrieve(made.id))
    assert running.status == "running" and abs(running.estimated_finish - time.time() - 100) < 30
    publish(any_api, claim, tokens_trained=1234)
    done = conforms(sdk.fine_tuning.jobs.retrieve(made.id))
    assert (done.status, done.trained_tokens, done.estimated_finish) == ("succeeded", 1234, None)
    assert done.fine_tuned_model == f"ft:{BASE}:default:my-bot:{made.id}"
    assert done.finished_at >= done.created_at and done.tunery["status"] == "succeeded"


def test_pages_of_jobs_by_metadata(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    made = [create(sdk, metadata={"n": str(number % 2)} if number else None).id for number in range(5)]
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=2)] == made[::-1], "the client turns the pages"
    page = sdk.fine_tuning.jobs.list(limit=3, after=made[-1])
    assert (page.has_more, [job.id for job in page.data]) == (True, made[-2:-5:-1])
    assert not sdk.fine_tuning.jobs.list(limit=4, after=made[4]).has_more
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"n": "1"}, limit=1)] == [made[3], made[1]]
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"n": ""})] == []
    assert [job.id for job in sdk.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [made[0]]
    with pytest.raises(openai.BadRequestError, match="metadata"):
        sdk.fine_tuning.jobs.list(extra_query={"metadata": "all"})


def test_events_tell_what_was_measured_newest_first(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    job = create(sdk, validation_file=upload(sdk, "valid.jsonl"))
    run(any_api, job.id)
    every = [conforms(event) for event in sdk.fine_tuning.jobs.list_events(job.id, limit=3)]
    assert len({event.id for event in every}) == len(every)
    assert every[-1].message.startswith("The job was accepted") and every[0].message == "Checkpoint at step 4."
    assert [event.level for event in every if event.message.startswith("Some")] == ["warn"]
    measured = [event for event in every if event.type == "metrics"]
    assert [event.message for event in measured] == [
        "Step 3/4: training loss=1.0000", "Step 2/4: full validation loss=2.5000", "Step 2/4: training loss=2.0000",
        "Step 1/4: training loss=3.0000",
    ]  # fmt: skip
    assert measured[1].data == {
        "step": 2, "total_steps": 4, "valid_loss": 2.5, "full_valid_loss": 2.5, "valid_mean_token_accuracy": 0.75,
        "full_valid_mean_token_accuracy": 0.75, "perplexity": 12.0,
    }  # fmt: skip
    assert measured[3].data["train_mean_token_accuracy"] == 0.25 and measured[3].data["learning_rate"] == 2e-4
    one = sdk.fine_tuning.jobs.list_events(job.id, limit=1)
    assert one.has_more and not sdk.fine_tuning.jobs.list_events(job.id, after=every[-2].id).has_more
    for wrong in ("nonsense", every[0].id.replace("ftevent", "ftckpt"), f"{every[0].id}x"):
        with pytest.raises(openai.BadRequestError) as refusal:
            sdk.fine_tuning.jobs.list_events(job.id, after=wrong)
        assert refusal.value.param == "after"


def test_a_step_that_was_repeated_is_measured_once(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    job = create(sdk)
    claim = run(any_api, job.id)
    with any_api.context.write() as session:
        lifecycle.advance(session, claim, metrics=[MetricPoint(2, {"loss": 9.0})])
    trained = [event.data for event in sdk.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    assert [data["train_loss"] for data in trained if data["step"] == 2 and "train_loss" in data] == [9.0]
    assert [item.metrics.train_loss for item in sdk.fine_tuning.jobs.checkpoints.list(job.id)] == [1.0, 9.0]


def test_checkpoints_carry_what_was_measured_there(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    job = create(sdk, suffix="s")
    claim = run(any_api, job.id)
    last, first = [conforms(item) for item in sdk.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    assert (last.step_number, first.step_number) == (4, 2) and last.fine_tuning_job_id == job.id
    assert first.metrics.to_dict() == {
        "step": 2, "train_loss": 2.0, "train_mean_token_accuracy": 0.5, "valid_loss": 2.5, "full_valid_loss": 2.5,
        "valid_mean_token_accuracy": 0.75, "full_valid_mean_token_accuracy": 0.75,
    }  # fmt: skip
    assert last.metrics.train_loss == 1.0 and last.metrics.valid_loss is None, "the last training loss before it"
    named = f"ft:{BASE}:default:s:{job.id}"
    assert [first.fine_tuned_model_checkpoint, last.fine_tuned_model_checkpoint] == [
        f"{named}:ckpt-step-2", f"{named}:ckpt-step-4"
    ]  # fmt: skip
    publish(any_api, claim)
    last, first = list(sdk.fine_tuning.jobs.checkpoints.list(job.id))
    assert last.fine_tuned_model_checkpoint == named, "the last step is what the model became"
    assert first.fine_tuned_model_checkpoint == f"{named}:ckpt-step-2"
    publish_best = {"steps": 4, "published_step": 2}
    with any_api.context.write() as session:
        session.execute(update(JobRow).values(report=publish_best))
    last, first = list(sdk.fine_tuning.jobs.checkpoints.list(job.id))
    assert first.fine_tuned_model_checkpoint == named != last.fine_tuned_model_checkpoint


def test_wishes_and_what_a_state_does_not_allow(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    jobs = sdk.fine_tuning.jobs
    job = create(sdk)
    assert conforms(jobs.cancel(job.id)).status == "cancelled"
    assert jobs.cancel(job.id).finished_at is not None, "a repeated call gets the same answer"
    for late in (jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="cancelled") as refusal:
            late(job.id)
        assert refusal.value.code in ("cannot_pause", "cannot_resume")
    waiting = create(sdk, suffix="b")
    with any_api.context.write() as session:
        check = lifecycle.claim_preflight(session, "p", 60)
        assert check is not None
        report = {"epochs": 3.0, "rows_per_step": 16}
        lifecycle.accept(session, check, base_id="b", base_revision=None, dataset_sha256="0" * 64, report=report)
    paused = conforms(jobs.pause(waiting.id))
    assert (paused.status, paused.tunery["status"]) == ("queued", "paused")
    assert conforms(jobs.resume(waiting.id)).tunery["status"] == "queued"
    chosen = jobs.retrieve(waiting.id).hyperparameters
    assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (3, 16, 1.0), "what auto came to"


def test_a_failure_says_what_and_in_which_file(api: Api, sdk: OpenAI) -> None:
    job = create(sdk)
    with api.context.write() as session:
        check = lifecycle.claim_preflight(session, "p", 60)
        assert check is not None
        failure = Failure("user_error", "bad_row", "dataset: row 7 is broken", "mend it", "dataset")
        lifecycle.reject(session, check, failure)
    failed = conforms(sdk.fine_tuning.jobs.retrieve(job.id))
    assert failed.status == "failed" and failed.fine_tuned_model is None and failed.trained_tokens is None
    assert (failed.error.code, failed.error.param) == ("bad_row", "training_file")
    assert failed.error.message == "training_file: row 7 is broken. mend it."


HYPERPARAMETERS: list[tuple[dict[str, Any], dict[str, Any], tuple[Any, Any, Any]]] = [
    ({}, {"num_train_epochs": "auto", "per_device_train_batch_size": "auto", "learning_rate": "auto"},
     ("auto", "auto", "auto")),
    ({"hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}},
     {"num_train_epochs": "auto", "gradient_accumulation_steps": "auto", "learning_rate": "auto"},
     ("auto", "auto", "auto")),
    ({"hyperparameters": {"n_epochs": 4, "batch_size": 7, "learning_rate_multiplier": 0.1}},
     {"num_train_epochs": 4.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 7,
      "learning_rate": 2e-5}, (4, 7, 0.1)),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 2}}}},
     {"learning_rate": 4e-4}, ("auto", "auto", 2.0)),
    ({"method": {"type": "supervised"}}, {"learning_rate": "auto"}, ("auto", "auto", "auto")),
    ({"extra_body": {"hyperparameters": {"num_train_epochs": 0.5, "per_device_train_batch_size": 2, "max_length": 64,
                                         "learning_rate_multiplier": 0.5}}},
     {"num_train_epochs": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_length": 64,
      "learning_rate": 1e-4}, (None, 8, 0.5)),
    ({"extra_body": {"method": "full"}, "hyperparameters": {"learning_rate_multiplier": 3}},
     {"learning_rate": 6e-5}, ("auto", "auto", 3.0)),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "means", "told"), HYPERPARAMETERS)
def test_hyperparameters_in_their_words(
    api: Api, sdk: OpenAI, asked: dict[str, Any], means: dict[str, Any], told: tuple[Any, Any, Any]
) -> None:
    job = create(sdk, **asked)
    spec = native(api, job.id)["hyperparameters"]
    assert {name: spec[name] for name in means} == pytest.approx(means)
    for shown in (job.hyperparameters, job.method.supervised.hyperparameters):
        assert (shown.n_epochs, shown.batch_size, shown.learning_rate_multiplier) == told


def test_settings_of_tunery_go_in_the_extra_body(api: Api, sdk: OpenAI) -> None:
    extra = {
        "lora": {"r": 8, "target_modules": "all-linear"}, "quantization": {"bnb_4bit_quant_type": "fp4"}, "priority": 5,
        "not_before": "2199-01-01T00:00:00Z", "validation_split": 0.25, "export": ["adapter", "merged"],
        "sample_prompts": ["Hello?"], "chat_template": "{{ messages }}", "hyperparameters": {"max_steps": 3},
    }  # fmt: skip
    job = create(sdk, extra_body=extra, method=SUPERVISED)
    spec = native(api, job.id)
    assert (spec["method"], spec["lora"]["r"], spec["lora"]["target_modules"]) == ("qlora", 8, "all-linear")
    assert spec["quantization"]["bnb_4bit_quant_type"] == "fp4" and spec["priority"] == 5
    assert datetime.fromisoformat(spec["not_before"]) == datetime(2199, 1, 1, tzinfo=UTC)
    assert spec["hyperparameters"]["max_steps"] == 3 and spec["hyperparameters"]["num_train_epochs"] == 2.0
    others = ("validation_split", "export", "sample_prompts", "chat_template")
    assert {name: spec[name] for name in others} == {name: extra[name] for name in others}
    plain = create(sdk, extra_body={"quantization": {"load_in_4bit": False}}, method=SUPERVISED)
    assert native(api, plain.id)["method"] == "lora"


def test_whatever_a_job_takes_can_be_asked_for_here_too() -> None:
    ours = set(JobSpec.model_fields) - {"dataset", "validation_dataset"}
    assert ours <= set(JobCreate.model_fields)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "gpt-4o-mini"}, "model", "no base model"),
    ({"model": f"ft:{BASE}:default::job_1"}, "model", "fine-tuned model"),
    ({"training_file": "ds_00000000000000000000000000"}, "training_file", "training_file: there is no dataset"),
    ({"validation_file": "ds_1"}, "validation_file", "validation_file: there is no dataset"),
    ({"training_file": "ftp://x"}, "training_file", "must start with"),
    ({"suffix": "x" * 65}, "suffix", "64"),
    ({"suffix": "a:b"}, "suffix", "pattern"),
    ({"seed": -1}, "seed", "greater"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method", "preference"),
    ({"method": {"type": "supervised", "reinforcement": {"grader": {}}}}, "method", "reinforcement"),
    ({"method": {"type": "reinforcement"}}, "method", "reinforcement"),
    ({"method": {"type": "magic"}}, "method.type", "supervised"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "wandb"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "auto"),
    ({"hyperparameters": {"learning_rat": 1}}, "hyperparameters.learning_rat", "learning_rate"),
    ({"hyperparameters": {"n_epochs": 3}, "method": SUPERVISED}, "hyperparameters.n_epochs", "otherwise"),
    ({"hyperparameters": {"n_epochs": 3, "num_train_epochs": 3}}, "hyperparameters.num_train_epochs", "the same"),
    ({"extra_body": {"lora": {"rank": 3}}}, "lora.rank", "r"),
    ({"extra_body": {"temperature": 3}}, "temperature", "known"),
    ({"extra_body": {"method": "full", "lora": {}}}, "lora", "no adapter"),
    ({"validation_file": "ds_1", "extra_body": {"validation_split": 0.1}}, "validation_split", "validation_file names"),
]


def test_what_is_refused_names_the_field(api: Api, sdk: OpenAI, subtests: pytest.Subtests) -> None:
    file = upload(sdk)
    for change, param, words in REFUSED:
        with subtests.test(change=str(change)):
            with pytest.raises(openai.BadRequestError) as refusal:
                sdk.fine_tuning.jobs.create(**{"model": BASE, "training_file": file, **change})
            error = refusal.value
            assert error.param == param and error.type == "invalid_request_error" and error.code, error
            assert words in error.message, error.message
    assert not sdk.fine_tuning.jobs.list().data
    assert create(sdk, integrations=None, metadata=None, suffix=None, seed=None, validation_file=None).seed == 42
    assert create(sdk, integrations=[]).integrations == []


def test_errors_are_the_clients_own(api: Api, sdk: OpenAI, connect: Connect) -> None:
    job = create(sdk)
    other = connect(api, api.new_key("other"))
    calls = sdk.fine_tuning.jobs
    for call in (calls.retrieve, calls.cancel, calls.pause, calls.resume, calls.list_events, calls.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as missing:
            call("ftjob-none")
        assert missing.value.code == "not_found" and missing.value.request_id
    with pytest.raises(openai.NotFoundError):
        other.fine_tuning.jobs.retrieve(job.id)
    assert not other.fine_tuning.jobs.list().data
    with pytest.raises(openai.AuthenticationError):
        connect(api, "tnr_wrong").fine_tuning.jobs.list()
    with api.client() as client:
        assert client.put("/quota", json={"max_queued": 1}).status_code < 300
    with pytest.raises(openai.RateLimitError) as over:
        connect(api, max_retries=0).fine_tuning.jobs.create(model=BASE, training_file=job.training_file)
    assert over.value.type == "rate_limit_error"


class LosesAnswers(httpx2.HTTPTransport):
    """A network that loses the answers to the first two requests, which were served."""

    num_sent = 0

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = super().handle_request(request)
        self.num_sent += 1
        if self.num_sent > 2:
            return answer
        answer.close()
        raise httpx2.ReadError("the connection broke", request=request)


def test_a_repeated_create_makes_no_second_job(start: Any, sqlite_url: str, connect: Connect) -> None:
    api = start(sqlite_url, repeat_window_s=30)
    sdk = connect(api)
    file = upload(sdk)
    losing = LosesAnswers()
    with openai.DefaultHttpxClient(transport=losing) as http_client:
        repeating = sdk.with_options(http_client=http_client)
        first = create(repeating, training_file=file, suffix="a")
    assert losing.num_sent == 3, "the client sent it again by itself, twice"
    assert create(sdk, training_file=file, suffix="a").id == first.id
    assert create(sdk, training_file=file, suffix="b").id != first.id
    keyed = {"training_file": file, "extra_headers": {"Idempotency-Key": "k"}}
    assert create(sdk, **keyed).id == create(sdk, **keyed).id
    assert len(list(sdk.fine_tuning.jobs.list())) == 3
    with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
        create(sdk, **keyed, suffix="c")
