"""Settings of the process, from the environment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from app.errors import ConfigurationError

_PREFIX = "HIKYAKU_"


class Settings(BaseModel):
    """One field a variable; the variable is the field's alias, in capitals."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    model_repository: str = Field(
        "models",
        alias="MODEL_REPOSITORY",
        description="Folder or URL (`s3://bucket/models`) of the models: <name>/model.yaml and the "
        "published versions.",
    )
    work_dir: Path = Field(
        Path(".hikyaku"),
        alias="HIKYAKU_WORK_DIR",
        description="Folder of this service's own: verified copies of model versions and the last "
        "release state.",
    )
    trusted_keys: Path | None = Field(
        None,
        alias="HIKYAKU_TRUSTED_KEYS",
        description="File of ed25519 public keys (PEM); every version must be signed by one of "
        "them. Unset: none needs to be.",
    )
    feature_redis_url: str | None = Field(
        None,
        alias="FEATURE_REDIS_URL",
        description="Redis, its Sentinels or Redis Cluster of the online features, read directly; "
        "unset: the Feast SDK reads the store of feature_store.yaml, several times slower.",
    )
    state_redis_url: str | None = Field(
        None,
        alias="STATE_REDIS_URL",
        description="Redis of the state that replicas share; checked at start when given.",
    )
    feature_repo: Path = Field(
        Path("feature_repo"),
        alias="HIKYAKU_FEATURE_REPO",
        description="Folder of feature_store.yaml.",
    )
    repository_poll_s: Annotated[float, Field(ge=0)] = Field(
        2.0,
        alias="HIKYAKU_REPOSITORY_POLL_S",
        description="Seconds between looks at CURRENT of each model, which is loaded when it names "
        "another version; 0: never, only by `:load`.",
    )
    registry_check_s: Annotated[float, Field(ge=0)] = Field(
        300.0,
        alias="HIKYAKU_REGISTRY_CHECK_S",
        description="Seconds between comparisons of the served plans with Feast's registry; "
        "0: never.",
    )
    host: str = Field("127.0.0.1", alias="HIKYAKU_HOST", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, alias="HIKYAKU_PORT", description="Port to listen on; 0 takes a free one."
    )
    operator_token: SecretStr | None = Field(
        None,
        alias="HIKYAKU_OPERATOR_TOKEN",
        description="Who may load, roll back and release: a token a line, or `name:token`. Unset: "
        "whoever runs programs on this machine, and only while the service listens on loopback.",
    )
    operator_token_file: Path | None = Field(
        None,
        alias="HIKYAKU_OPERATOR_TOKEN_FILE",
        description="File with more such lines, read at start.",
    )
    workers: Annotated[int, Field(ge=1, le=128)] = Field(
        1,
        alias="HIKYAKU_WORKERS",
        description="Processes that answer, each with an event loop, the models and a listening "
        "socket of its own.",
    )
    max_body_bytes: Annotated[int, Field(ge=1)] = Field(
        8 * 1024 * 1024,
        alias="HIKYAKU_MAX_BODY_BYTES",
        description="Largest request body; a larger one is answered 413.",
    )
    replay_clock: AwareDatetime | None = Field(
        None,
        alias="HIKYAKU_REPLAY_CLOCK",
        description="Start of the replay clock (RFC 3339); unset: feature time is wall time.",
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(
        10.0,
        alias="HIKYAKU_DRAIN_S",
        description="Longest wait for requests under way when the process is told to stop.",
    )
    stuck_s: Annotated[float, Field(ge=0)] = Field(
        10.0,
        alias="HIKYAKU_STUCK_S",
        description="A worker whose event loop has not run for so long is killed and replaced; "
        "0: never.",
    )
    comparison_log: Path | None = Field(
        None,
        alias="HIKYAKU_COMPARISON_LOG",
        description="Folder for what champion and candidates said about every row, a JSON line "
        "each (docs/pair_log.md); unset: it is only counted.",
    )
    comparison_log_mb: Annotated[int, Field(ge=1)] = Field(
        1000,
        alias="HIKYAKU_COMPARISON_LOG_MB",
        description="So much the files there take together, the oldest go first.",
    )
    webhooks: SecretStr | None = Field(
        None,
        alias="HIKYAKU_WEBHOOKS",
        description="URLs that are told of releases, with commas between them (docs/events.md); "
        "unset: nobody is.",
    )
    webhook_hosts: str | None = Field(
        None,
        alias="HIKYAKU_WEBHOOK_HOSTS",
        description="Hosts of these URLs that may be told: another one's stops the start.",
    )
    webhook_networks: str | None = Field(
        None,
        alias="HIKYAKU_WEBHOOK_NETWORKS",
        description="Private networks (`10.1.0.0/16`) where such a host may be; elsewhere only "
        "public addresses are sent to.",
    )
    webhook_secret: SecretStr | None = Field(
        None,
        alias="HIKYAKU_WEBHOOK_SECRET",
        description="What events are signed with: `whsec_` and 24 to 64 bytes in base64; two with "
        "a comma while it is exchanged.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", alias="HIKYAKU_LOG_LEVEL", description="Least severe level that is logged."
    )


def load_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings. Raises `ConfigurationError` naming every variable at fault, unknown ones
    with our prefix included: a mistyped name must not be silently ignored."""
    environment = os.environ if environment is None else environment
    known = {str(field.alias) for field in Settings.model_fields.values()}
    unknown = sorted(n for n in environment if n.startswith(_PREFIX) and n not in known)
    if unknown:
        raise ConfigurationError(
            f"unknown settings: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    if environment.get("HIKYAKU_TRUSTED_KEYS") == "":
        # Elsewhere empty is unset; here that would let every version in.
        raise ConfigurationError(
            "HIKYAKU_TRUSTED_KEYS: is empty: name a file, or unset it where nothing is to be signed"
        )
    given = {name: value for name, value in environment.items() if name in known and value != ""}
    try:
        return Settings.model_validate(given)
    except ValidationError as exc:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in exc.errors())
        raise ConfigurationError(faults) from None
