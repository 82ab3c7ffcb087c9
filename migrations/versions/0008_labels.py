"""Indexes by which jobs are found by label and model, a tenant's use is summed, and what is old is forgotten"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# Both name the columns of their rows `key` and `value`.
_EACH = {"postgresql": "jsonb_each_text(jobs.metadata)", "sqlite": "json_each(jobs.metadata)"}


def upgrade() -> None:
    op.create_table(
        "job_labels",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.String(length=512), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tenant", "key", "value", "job_id"),
    )
    each = _EACH[op.get_bind().dialect.name]
    op.execute(
        "INSERT INTO job_labels (tenant, key, value, job_id)"
        f" SELECT jobs.tenant, label.key, label.value, jobs.id FROM jobs CROSS JOIN {each} AS label"
    )
    op.create_index("ix_job_labels_job_id", "job_labels", ["job_id"])
    op.create_index("jobs_by_tenant_model", "jobs", ["tenant", "model", "id"])
    op.drop_index("usage_by_tenant", "usage")
    op.create_index("usage_by_tenant", "usage", ["tenant", "ended_at", "started_at"])
    op.create_index("usage_by_age", "usage", ["ended_at"])
    op.create_index("idempotency_by_age", "idempotency_keys", ["created_at"])


def downgrade() -> None:
    op.drop_index("idempotency_by_age", "idempotency_keys")
    op.drop_index("usage_by_age", "usage")
    op.drop_index("usage_by_tenant", "usage")
    op.create_index("usage_by_tenant", "usage", ["tenant", "ended_at"])
    op.drop_index("jobs_by_tenant_model", "jobs")
    op.drop_table("job_labels")
