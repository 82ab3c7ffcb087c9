"""`tunery keys`: create, list, revoke."""

from __future__ import annotations

from typing import Annotated

import typer

from common.cli import state

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

Tenant = Annotated[str | None, typer.Option(help="Another tenant than your own; for administrators.")]


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for.", metavar="NAME")],
    tenant: Tenant = None,
    output: state.Output = None,
) -> None:
    """Make a key and show it, this once: only its hash is kept."""
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        key = client.keys.create(name, tenant=tenant)
    if options.as_json:
        screen.as_json(key)
        return
    screen.fields([("id", key.id), ("name", key.name), ("tenant", key.tenant), ("key", key.key)])
    screen.stderr().print("keep it: it is not shown again", style="yellow")


@app.command("list")
def list_keys(ctx: typer.Context, tenant: Tenant = None, output: state.Output = None) -> None:
    """List keys, without their secrets."""
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        page = client.keys.list(tenant=tenant)
    if options.as_json:
        screen.as_json(page)
        return
    columns = [
        screen.Column("KEY", lambda item: item.id),
        screen.Column("NAME", lambda item: item.name, spare=1),
        screen.Column("HINT", lambda item: item.hint, spare=2),
        screen.Column("TENANT", lambda item: item.tenant, spare=3),
        screen.Column("USED", lambda item: screen.ago(item.last_used_at) or "never", spare=4),
        screen.Column("REVOKED", lambda item: screen.ago(item.revoked_at), spare=2),
    ]
    screen.table(columns, page)


@app.command()
def revoke(
    ctx: typer.Context,
    keys: Annotated[list[str], typer.Argument(help="Ids of keys.", metavar="KEY…")],
    tenant: Tenant = None,
    output: state.Output = None,
) -> None:
    """End keys at once."""
    from common.cli import screen

    options = state.of(ctx)
    with options.connect() as client:
        for key in keys:
            client.keys.revoke(key, tenant=tenant)
            if not options.as_json:
                typer.echo(f"revoked: {screen.sentence(key)}")
    if options.as_json:
        screen.as_json({"revoked": keys})
