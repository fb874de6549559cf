"""API keys: how they begin, when they end, when they were last used, their own rate limit"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("prefix", sa.Text(), server_default="", nullable=False))
    op.add_column("api_keys", sa.Column("rate_limit", sa.Text(), nullable=True))
    op.add_column("api_keys", sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # What has ended stays so where nobody looks at its end any more.
    op.execute("UPDATE api_keys SET revoked_at = expires_at WHERE expires_at <= now() AND revoked_at IS NULL")
    for column in ("expires_at", "last_used_at", "rate_limit", "prefix"):
        op.drop_column("api_keys", column)
