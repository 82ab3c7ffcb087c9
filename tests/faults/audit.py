"""A log inside the database that the product does not know: triggers write down every change of a job.

They run in the transaction of the change itself, so that what was committed was logged, and nothing else. `at` is the
database's clock in seconds since the epoch, like the leases.
"""

from __future__ import annotations

from sqlalchemy import Engine, text

_SQLITE_NOW = "((julianday('now') - 2440587.5) * 86400.0)"
# SQLite has no number of a transaction; there, nobody else can write between its statements anyway.
_SQLITE_TX = "NULL"
_POSTGRES_TX = "txid_current()::text"
_POSTGRES_NOW = "extract(epoch from clock_timestamp())::double precision"
_COLUMNS = """(at, tx, what, job_id, old_status, status, old_epoch, epoch, old_worker, worker,
    old_lease, lease, step, manifest_key)"""

_TABLE = """
CREATE TABLE fault_audit (n {serial}, at DOUBLE PRECISION, tx TEXT, what TEXT, job_id TEXT,
    old_status TEXT, status TEXT, old_epoch INTEGER, epoch INTEGER, old_worker TEXT, worker TEXT,
    old_lease DOUBLE PRECISION, lease DOUBLE PRECISION, step INTEGER, manifest_key TEXT)
"""
# What is written for each event; {now} is the clock. For children of a job, `epoch` is what the writer claims and
# `old_epoch` what the job's row says.
_INSERTS = {
    ("jobs", "INSERT"): """INSERT INTO fault_audit {columns} VALUES ({now}, {tx}, 'submitted', NEW.id, NULL, NEW.status,
        NULL, NEW.epoch, NULL, NEW.worker_id, NULL, NEW.lease_expires_at, NEW.step, NEW.manifest_key);""",
    (
        "jobs",
        "UPDATE",
    ): """INSERT INTO fault_audit {columns} VALUES ({now}, {tx}, 'changed', NEW.id, OLD.status, NEW.status,
        OLD.epoch, NEW.epoch, OLD.worker_id, NEW.worker_id, OLD.lease_expires_at, NEW.lease_expires_at, NEW.step,
        NEW.manifest_key);""",
    ("jobs", "DELETE"): """INSERT INTO fault_audit {columns} VALUES ({now}, {tx}, 'deleted', OLD.id, OLD.status, NULL,
        OLD.epoch, NULL, OLD.worker_id, NULL, OLD.lease_expires_at, NULL, OLD.step, OLD.manifest_key);""",
    (
        "checkpoints",
        "INSERT",
    ): """INSERT INTO fault_audit {columns} SELECT {now}, {tx}, 'checkpoint', id, status, status,
        epoch, NEW.epoch, worker_id, worker_id, lease_expires_at, lease_expires_at, NEW.step, manifest_key
        FROM jobs WHERE id = NEW.job_id;""",
    ("metrics", "INSERT"): """INSERT INTO fault_audit {columns} SELECT {now}, {tx}, 'metric', id, status, status,
        epoch, NEW.epoch, worker_id, worker_id, lease_expires_at, lease_expires_at, NEW.step, manifest_key
        FROM jobs WHERE id = NEW.job_id;""",
    ("artifacts", "INSERT"): """INSERT INTO fault_audit {columns} SELECT {now}, {tx}, 'artifact', id, status, status,
        epoch, epoch, worker_id, worker_id, lease_expires_at, lease_expires_at, step, NEW.key
        FROM jobs WHERE id = NEW.job_id;""",
}


def install(engine: Engine) -> None:
    """Add the log and its triggers to a migrated database."""
    sqlite = engine.dialect.name == "sqlite"
    serial = "INTEGER PRIMARY KEY AUTOINCREMENT" if sqlite else "BIGSERIAL PRIMARY KEY"
    with engine.begin() as connection:
        connection.execute(text(_TABLE.format(serial=serial)))
        for (table, event), insert in _INSERTS.items():
            now, tx = (_SQLITE_NOW, _SQLITE_TX) if sqlite else (_POSTGRES_NOW, _POSTGRES_TX)
            body = insert.format(columns=_COLUMNS, now=now, tx=tx)
            name = f"fault_audit_{table}_{event.lower()}"
            for statement in (_sqlite if sqlite else _postgres)(name, table, event, body):
                connection.exec_driver_sql(statement)


def _sqlite(name: str, table: str, event: str, body: str) -> list[str]:
    return [f"CREATE TRIGGER {name} AFTER {event} ON {table} BEGIN {body} END"]


def _postgres(name: str, table: str, event: str, body: str) -> list[str]:
    return [
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NULL; END $$",
        f"CREATE TRIGGER {name} AFTER {event} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()",
    ]
