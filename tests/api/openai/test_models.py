"""Models through the stock client: bases, and what jobs have made."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from common.workers import Beat, beat
from tests.api.conftest import BASE, Api, drive, finish
from tests.api.openai.conftest import Connect, conforms
from tests.api.openai.test_jobs import create


def finished(api: Api, sdk: OpenAI, suffix: str | None = None) -> str:
    """Let a job succeed and return the name of its model."""
    job = create(sdk, suffix=suffix)
    finish(api.context, drive(api.context, job.id))
    return str(sdk.fine_tuning.jobs.retrieve(job.id).fine_tuned_model)


def test_models_are_bases_and_what_was_made_of_them(any_api: Api, connect: Connect) -> None:
    sdk = connect(any_api)
    with any_api.context.write() as session:
        beat(session, Beat("w", "w", "train", "cpu", None, None, "idle", base_model="org/held"))
    first, second = finished(any_api, sdk), finished(any_api, sdk, "bot")
    create(sdk, suffix="unfinished")
    listed = [conforms(model) for model in sdk.models.list()]
    assert [model.id for model in listed] == [BASE, "org/held", second, first]
    assert [model.owned_by for model in listed] == ["tunery"] * 2 + ["default"] * 2
    assert first.split(":")[:4] == ["ft", BASE, "default", ""] and second.split(":")[3] == "bot"
    for name in (BASE, "org/held", second):
        assert conforms(sdk.models.retrieve(name)).id == name
    job_id = second.rpartition(":")[2]
    assert sdk.models.retrieve(job_id).id == second, "a job's id names its model too"
    other = connect(any_api, any_api.new_key("other"))
    assert [model.id for model in other.models.list()] == [BASE, "org/held"]
    with pytest.raises(openai.NotFoundError):
        other.models.retrieve(second)


def test_a_deleted_model_is_gone_with_its_job(api: Api, sdk: OpenAI) -> None:
    name = finished(api, sdk)
    job_id = name.rpartition(":")[2]
    gone = conforms(sdk.models.delete(name))
    assert (gone.id, gone.deleted, gone.object) == (name, True, "model")
    assert [model.id for model in sdk.models.list()] == [BASE]
    for call, argument in ((sdk.models.retrieve, name), (sdk.fine_tuning.jobs.retrieve, job_id)):
        with pytest.raises(openai.NotFoundError):
            call(argument)
    assert not [item.key for item in api.context.store.objects(f"default/{job_id}/")]


def test_what_is_no_model(api: Api, sdk: OpenAI) -> None:
    running = create(sdk)
    drive(api.context, running.id)
    for name in ("gpt-4o-mini", "org/none", f"ft:{BASE}:default::{running.id}", "a%00b", "ft:x:ckpt-step-3"):
        with pytest.raises(openai.NotFoundError) as missing:
            sdk.models.retrieve(name)
        assert missing.value.param in ("model", "id"), missing.value
        with pytest.raises(openai.NotFoundError):
            sdk.models.delete(name)
    with pytest.raises(openai.PermissionDeniedError, match="base model"):
        sdk.models.delete(BASE)
    assert sdk.models.retrieve(BASE).id == BASE
