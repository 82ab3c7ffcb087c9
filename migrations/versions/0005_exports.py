"""Merged models of finished jobs: a job that has another one as its source"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("source_job", sa.String(length=40), nullable=True))
    op.create_index(
        "jobs_exported",
        "jobs",
        ["source_job"],
        sqlite_where=sa.text("source_job is not null"),
        postgresql_where=sa.text("source_job is not null"),
    )


def downgrade() -> None:
    op.drop_index("jobs_exported", "jobs")
    op.drop_column("jobs", "source_job")
