"""`tunery webhooks`: tell a URL of what happens to jobs, and see what became of each message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import state
from common.cli.removing import remove_each

if TYPE_CHECKING:
    from common.schemas.webhooks import Delivery, WebhookCreated, WebhookRead

app = typer.Typer(no_args_is_help=True, help="Tell a URL of what happens to jobs.")

WebhookId = Annotated[str, typer.Argument(help="Id of the webhook.", metavar="WEBHOOK")]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", "-e", help="Only of this, such as job.succeeded. Repeat it for more.", metavar="EVENT"),
]


@app.command()
def create(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(help="Where to; https, and a public address.", metavar="URL")],
    events: Events = None,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    output: state.Output = None,
) -> None:
    """Make a webhook and show its secret, this once."""
    options = state.of(ctx)
    with options.connect() as client:
        made = client.webhooks.create(url, events=events, description=description)
    _show_secret(made, options.as_json)


@app.command("list")
def list_webhooks(ctx: typer.Context, output: state.Output = None) -> None:
    """List webhooks, without their secrets."""
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        page = client.webhooks.list()
    if options.as_json:
        screen.as_json(page)
        return
    columns = [
        screen.Column("WEBHOOK", lambda item: item.id),
        screen.Column("URL", lambda item: item.url, spare=1),
        screen.Column("EVENTS", lambda item: ", ".join(item.events or ["all"]), spare=3),
        screen.Column("STATE", _state, spare=2),
        screen.Column("LAST TAKEN", lambda item: screen.ago(item.last_success_at) or "never", spare=4),
        screen.Column("DESCRIPTION", lambda item: item.description, spare=5),
    ]
    screen.table(columns, page)
    if not page.data:
        screen.stderr().print("no webhooks")


@app.command()
def change(
    ctx: typer.Context,
    webhook: WebhookId,
    url: Annotated[str | None, typer.Option(help="Another URL.")] = None,
    events: Events = None,
    all_events: Annotated[bool, typer.Option("--all-events", help="Of every event.")] = False,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    enabled: Annotated[bool | None, typer.Option("--enable/--disable", help="Switch it on or off.")] = None,
    output: state.Output = None,
) -> None:
    """Change what a webhook is told and where; switch it on or off."""
    from common.cli import screen

    given = {"url": url, "events": events, "description": description, "enabled": enabled}
    fields: Any = {name: value for name, value in given.items() if value is not None}
    if all_events:
        fields["events"] = None
    options = state.of(ctx)
    with options.connect() as client:
        found = client.webhooks.change(webhook, **fields)
    if options.as_json:
        screen.as_json(found)
        return
    typer.echo(f"{found.id}: {screen.sentence(_state(found))}")


@app.command("rm")
def remove(
    ctx: typer.Context,
    webhooks: Annotated[list[str], typer.Argument(help="Ids of webhooks.", metavar="WEBHOOK…")],
    output: state.Output = None,
) -> None:
    """Remove webhooks and their deliveries."""
    remove_each(ctx, webhooks, lambda client, webhook: client.webhooks.delete(webhook))


@app.command()
def rotate(
    ctx: typer.Context,
    webhook: WebhookId,
    leaked: Annotated[bool, typer.Option("--leaked", help="The old secret ends at once, not after a day.")] = False,
    output: state.Output = None,
) -> None:
    """Give a webhook a new secret and show it, this once."""
    options = state.of(ctx)
    with options.connect() as client:
        made = client.webhooks.rotate(webhook, overlap_s=0 if leaked else None)
    _show_secret(made, options.as_json)


@app.command()
def ping(ctx: typer.Context, webhook: WebhookId, output: state.Output = None) -> None:
    """Send a message that says nothing, as a test.

    `tunery webhooks deliveries` shows what came of it.
    """
    options = state.of(ctx)
    with options.connect() as client:
        sent = client.webhooks.ping(webhook)
    _show_delivery(sent, options.as_json)


@app.command()
def deliveries(
    ctx: typer.Context,
    webhook: WebhookId,
    which: Annotated[str | None, typer.Option("--state", "-s", help="pending, delivered or failed.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many.", min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Go on behind this id.")] = None,
    output: state.Output = None,
) -> None:
    """List what a webhook was and is to be told, newest first."""
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        page = client.webhooks.deliveries(webhook, state=which, limit=limit, after=after)
    if options.as_json:
        screen.as_json(page)
        return
    columns = [
        screen.Column("DELIVERY", lambda item: item.id),
        screen.Column("EVENT", lambda item: item.type, spare=1),
        screen.Column("JOB", lambda item: item.job, spare=3),
        screen.Column("STATE", lambda item: item.state),
        screen.Column("ATTEMPTS", lambda item: item.attempts, spare=4, right=True),
        screen.Column("LAST ANSWER", lambda item: item.error or item.response_status, spare=2),
        screen.Column("CREATED", lambda item: screen.ago(item.created_at), spare=5),
    ]
    screen.table(columns, page)
    if page.has_more and page.next:
        screen.stderr().print(f"more: --after {screen.sentence(page.next)}", style="dim")


@app.command()
def redeliver(
    ctx: typer.Context,
    webhook: WebhookId,
    delivery: Annotated[str, typer.Argument(help="Id of the delivery.", metavar="DELIVERY")],
    output: state.Output = None,
) -> None:
    """Send a delivery again, with the id that it had."""
    options = state.of(ctx)
    with options.connect() as client:
        sent = client.webhooks.redeliver(webhook, delivery)
    _show_delivery(sent, options.as_json)


def _state(webhook: WebhookRead) -> str:
    return "enabled" if webhook.enabled else f"disabled: {webhook.disabled_reason}"


def _show_secret(made: WebhookCreated, as_json: bool) -> None:
    from common.cli import screen

    if as_json:
        screen.as_json(made)
        return
    screen.fields([("id", made.id), ("url", made.url), ("secret", made.secret)])
    screen.stderr().print("keep the secret: it is not shown again", style="yellow")


def _show_delivery(sent: Delivery, as_json: bool) -> None:
    from common.cli import screen

    if as_json:
        screen.as_json(sent)
        return
    typer.echo(f"{sent.id}: {screen.sentence(sent.state)}")
