"""A queue that explains itself: the user's not_before, the time that workers gave to tenants, and quotas"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "epoch"),
    )
    op.create_index("usage_by_tenant", "usage", ["tenant", "ended_at"])
    op.create_table(
        "quotas",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("max_running", sa.BigInteger(), nullable=True),
        sa.Column("max_queued", sa.BigInteger(), nullable=True),
        sa.Column("max_gpu_hours", sa.Double(), nullable=True),
        sa.Column("max_priority", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("tenant"),
    )
    # Plain ALTERs: batch mode would copy the table, and SQLite's foreign keys to it are enforced.
    op.add_column("jobs", sa.Column("hold_until", sa.Double(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("claimed_at", sa.Double(), nullable=True))
    op.create_index(
        "jobs_succeeded",
        "jobs",
        ["base_id", "finished_at"],
        sqlite_where=sa.text("status = 'succeeded'"),
        postgresql_where=sa.text("status = 'succeeded'"),
    )


def downgrade() -> None:
    op.drop_index("jobs_succeeded", "jobs")
    op.drop_column("jobs", "claimed_at")
    op.drop_column("jobs", "hold_until")
    op.drop_table("quotas")
    op.drop_table("usage")
