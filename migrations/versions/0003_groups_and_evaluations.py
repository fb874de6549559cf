"""groups of runs; evaluations that keep their predictions, on any data set; what the leaderboard reads"""

import hashlib
import json

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "run_groups",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("dataset_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run_groups")),
    )
    op.create_index(op.f("ix_run_groups_owner"), "run_groups", ["owner"])
    op.create_index(op.f("ix_run_groups_dataset_id"), "run_groups", ["dataset_id"])
    for table in ("jobs", "classifiers"):
        op.add_column(table, sa.Column("group_id", sa.Text(), nullable=True))
        name = f"fk_{table}_group_id_run_groups"
        op.create_foreign_key(name, table, "run_groups", ["group_id"], ["id"], ondelete="SET NULL")
        op.create_index(f"ix_{table}_group_id", table, ["group_id"])

    op.alter_column("classifiers", "job_id", existing_type=sa.Text(), nullable=True)
    op.add_column("classifiers", sa.Column("setting", sa.Text(), nullable=True))
    op.add_column("classifiers", sa.Column("tags", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False))
    op.add_column("classifiers", sa.Column("pinned", sa.Boolean(), server_default="false", nullable=False))
    connection = op.get_bind()
    rows = connection.execute(
        sa.text("""
            SELECT id, protocol, method, model, captioner, shots, hyperparameters, suffix, details->'captions'
            FROM classifiers
        """)
    ).all()
    for id, *chosen in rows:
        setting = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:32]
        connection.execute(sa.text("UPDATE classifiers SET setting = :s WHERE id = :id"), {"s": setting, "id": id})
    op.alter_column("classifiers", "setting", nullable=False)
    op.execute("UPDATE classifiers SET pinned = true WHERE protocol = 'zero_shot'")
    op.create_index("ix_classifiers_dataset_id_setting", "classifiers", ["dataset_id", "setting"])
    op.create_index(
        "ix_classifiers_leaderboard",
        "classifiers",
        ["id"],
        postgresql_include=[
            *("owner", "dataset_id", "data_fingerprint", "setting", "protocol"),
            *("shots", "shot_seed", "seed", "pinned", "group_id"),
        ],
    )

    op.create_table(
        "evaluations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("classifier_id", sa.Text(), nullable=False),
        sa.Column("dataset_id", sa.Text(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("head", sa.Text(), nullable=False),
        sa.Column("data_fingerprint", sa.Text(), nullable=False),
        sa.Column("predictions_key", sa.Text(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        sa.Column("correct", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["id"], ["jobs.id"], name=op.f("fk_evaluations_id_jobs")),
        sa.ForeignKeyConstraint(
            ["classifier_id"],
            ["classifiers.id"],
            name=op.f("fk_evaluations_classifier_id_classifiers"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
        sa.UniqueConstraint(
            "classifier_id",
            "dataset_id",
            "split",
            "head",
            name=op.f("uq_evaluations_classifier_id_dataset_id_split_head"),
        ),
    )
    op.create_index(op.f("ix_evaluations_dataset_id"), "evaluations", ["dataset_id"])

    op.add_column("scores", sa.Column("dataset_id", sa.Text(), nullable=True))
    op.add_column("scores", sa.Column("head", sa.Text(), server_default="own", nullable=False))
    op.alter_column("scores", "head", server_default=None)
    op.execute("UPDATE scores SET dataset_id = c.dataset_id FROM classifiers c WHERE c.id = scores.classifier_id")
    op.alter_column("scores", "dataset_id", nullable=False)
    op.drop_constraint("pk_scores", "scores", type_="primary")
    op.create_primary_key("pk_scores", "scores", ["classifier_id", "dataset_id", "split", "head", "metric"])
    op.create_index(
        "ix_scores_leaderboard",
        "scores",
        ["dataset_id", "split", "metric", "head"],
        postgresql_include=["classifier_id", "value"],
    )

    op.create_table(
        "leaderboard_versions",
        sa.Column("dataset_id", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("dataset_id", name=op.f("pk_leaderboard_versions")),
    )


def downgrade() -> None:
    op.drop_table("leaderboard_versions")
    op.drop_index("ix_scores_leaderboard", table_name="scores")
    op.execute("""
        DELETE FROM scores s USING classifiers c
        WHERE c.id = s.classifier_id AND (s.dataset_id <> c.dataset_id OR s.head <> 'own')
    """)
    op.drop_constraint("pk_scores", "scores", type_="primary")
    op.create_primary_key("pk_scores", "scores", ["classifier_id", "split", "metric"])
    op.drop_column("scores", "head")
    op.drop_column("scores", "dataset_id")
    op.drop_table("evaluations")
    op.drop_index("ix_classifiers_leaderboard", table_name="classifiers")
    op.drop_index("ix_classifiers_dataset_id_setting", table_name="classifiers")
    for column in ("pinned", "tags", "setting"):
        op.drop_column("classifiers", column)
    op.execute("DELETE FROM classifiers WHERE job_id IS NULL")
    op.alter_column("classifiers", "job_id", existing_type=sa.Text(), nullable=False)
    for table in ("classifiers", "jobs"):
        op.drop_index(f"ix_{table}_group_id", table_name=table)
        op.drop_constraint(f"fk_{table}_group_id_run_groups", table, type_="foreignkey")
        op.drop_column(table, "group_id")
    op.drop_table("run_groups")
