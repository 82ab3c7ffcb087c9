"""Puts the HTTP application together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import FastAPI
from fastapi.routing import APIRoute

from api import documentation, errors
from api.documentation import openai_answers, problem_answers
from api.edge import Edge
from api.finishing import Finishing
from api.limits import BodyLimit
from api.openai import files as openai_files
from api.openai import jobs as openai_jobs
from api.openai import models as openai_models
from api.openai import uploads as openai_uploads
from api.readiness import Readiness
from api.routes import adapters, base_models, datasets, health, history, jobs, keys, quota, uploads, webhooks, workers
from api.watching import Watcher
from common.context import Context
from common.keyring import Keyring

_ABOUT = "Fine-tune language models with QLoRA on your own GPUs: send a dataset, watch the job, download the adapter."


def create_app(context: Context) -> FastAPI:
    """Return the application over `context`, which the caller closes."""
    app = FastAPI(
        title="Tunery",
        version=_version(),
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_name,
        lifespan=_lifespan,
    )
    app.state.context = context
    app.state.keyring = Keyring(context)
    app.state.watcher = Watcher(context)
    app.state.finishing = Finishing(context)
    app.state.readiness = Readiness(context)
    errors.install(app)
    documentation.install(app)
    common_answers = problem_answers(400, 401, 503)
    for module in (jobs, history, adapters, datasets, uploads, base_models, workers, keys, quota, webhooks):
        app.include_router(module.router, responses=common_answers)
    for module in (openai_files, openai_uploads, openai_jobs, openai_models):
        app.include_router(module.router, prefix="/v1", responses=openai_answers(400, 401, 503))
    app.include_router(health.router)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, upload_bytes=context.settings.max_upload_bytes)
    app.add_middleware(Edge)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.watcher.close()
    app.state.finishing.close()


def _operation_name(route: APIRoute) -> str:
    return route.name


def _version() -> str:
    try:
        return metadata.version("tunery")
    except metadata.PackageNotFoundError:
        return "0"
