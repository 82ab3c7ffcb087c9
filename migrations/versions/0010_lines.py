"""Indexes of what waits, by state: a claim reads the first job of each tenant and priority, and not every job"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("jobs_to_claim", "jobs")
    _create("jobs_to_check", ["priority", "created_at"], "status = 'validating'")
    _create("jobs_to_claim", ["tenant", "priority", "created_at", "id"], "status = 'queued'")


def downgrade() -> None:
    op.drop_index("jobs_to_claim", "jobs")
    op.drop_index("jobs_to_check", "jobs")
    _create("jobs_to_claim", ["status", "priority", "created_at"], "status in ('validating', 'queued')")


def _create(name: str, columns: list[str], where: str) -> None:
    op.create_index(name, "jobs", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
