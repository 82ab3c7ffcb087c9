"""Uploads whose parts go straight to the object store"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("uploads", sa.Column("sha256", sa.String(length=64), nullable=True))
    op.add_column("uploads", sa.Column("part_bytes", sa.BigInteger(), nullable=True))
    op.add_column("uploads", sa.Column("store_upload", sa.Text(), nullable=True))
    op.create_index(
        "uploads_by_content",
        "uploads",
        ["tenant", "sha256"],
        sqlite_where=sa.text("sha256 is not null"),
        postgresql_where=sa.text("sha256 is not null"),
    )


def downgrade() -> None:
    op.drop_index("uploads_by_content", "uploads")
    for column in ("store_upload", "part_bytes", "sha256"):
        op.drop_column("uploads", column)
