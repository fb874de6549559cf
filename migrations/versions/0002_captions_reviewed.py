"""captions: length, review, agreement, full-text search"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Captions of before were not measured: 0 says so, and the next job with the same prompt measures its own.
    op.add_column("captions", sa.Column("clip_tokens", sa.Integer(), server_default="0", nullable=False))
    op.alter_column("captions", "clip_tokens", server_default=None)
    op.add_column("captions", sa.Column("excluded", sa.Boolean(), server_default="false", nullable=False))
    op.add_column("captions", sa.Column("version", sa.Integer(), server_default="1", nullable=False))
    op.add_column("captions", sa.Column("original_text", sa.Text(), nullable=True))
    op.add_column("captions", sa.Column("edited_by", sa.Text(), nullable=True))
    op.add_column(
        "caption_job_items",
        sa.Column("flags", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
    )
    op.add_column("caption_job_items", sa.Column("agreement", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.create_index(
        "ix_captions_search",
        "captions",
        [sa.text("to_tsvector('english'::regconfig, text)")],
        postgresql_using="gin",
    )


def downgrade() -> None:
    op.drop_index("ix_captions_search", table_name="captions", postgresql_using="gin")
    for column in ("agreement", "flags"):
        op.drop_column("caption_job_items", column)
    for column in ("edited_by", "original_text", "version", "excluded", "clip_tokens"):
        op.drop_column("captions", column)
