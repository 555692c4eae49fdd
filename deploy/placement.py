"""How many GPUs an LM replica gets, and that its engine uses just these.

A model that is split over several GPUs (`tensor_parallel`) needs them all on one machine, so they
are the resources of one replica, and Ray shows it these and no others.
"""

from __future__ import annotations

from cluster_router.wire.errors import ConfigError
from deploy.config import AppConfig, EngineSettings
from lm_workers.device import pick_device
from lm_workers.vllm.config import VllmConfig

NUM_CPUS = 0.5
_NICENESS = 2
"""Of an engine on a CPU beside other replicas, all of which Ray starts at 15; 19 is the last."""
_CPU_CHUNKS_PER_S, _GPU_CHUNKS_PER_S = 160.0, 1000.0


def lm_resources(engine: EngineSettings) -> dict[str, float]:
    """`ray_actor_options` of LM replicas where the deployment says nothing of them."""
    split = gpus_used(engine)
    return {"num_cpus": NUM_CPUS, "num_gpus": split} if split > 1 else {"num_cpus": NUM_CPUS}


def gpus_used(engine: EngineSettings) -> int:
    """GPUs that one engine computes on, if it does on any."""
    return engine.devices if isinstance(engine, VllmConfig) else 1


def lm_niceness(engine: EngineSettings) -> int:
    """What is added to the niceness of an engine's threads: they give way to all else on a CPU."""
    if isinstance(engine, VllmConfig) or pick_device(engine.device) != "cpu":
        return 0
    return _NICENESS


def lm_chunks_per_s(config: AppConfig) -> float:
    """Chunks that one LM replica sends in a second, where nobody has said how many."""
    asked, engine = config.streaming.chunks_per_s, config.engine
    if asked is not None:
        return asked
    device = pick_device("auto" if isinstance(engine, VllmConfig) else engine.device)
    return _CPU_CHUNKS_PER_S if device == "cpu" else _GPU_CHUNKS_PER_S


def check_gpus(engine: EngineSettings, given: float | None) -> None:
    """Refuse to give a replica other GPUs than its engine uses.

    Args:
        engine: its settings.
        given: `num_gpus` of the replica, a part of one included; 0 runs on the CPU, None says
            nothing.

    Raises:
        ConfigError: the two disagree.
    """
    used = gpus_used(engine)
    if given in {0, used} or (used == 1 and (given is None or given < 1)):
        return
    said = "no num_gpus" if given is None else f"num_gpus: {given:g}"
    advice = f"set num_gpus: {used}"
    if given is not None and given > 1:
        advice += f", or split the model with engine: {{backend: vllm, tensor_parallel: {given:g}}}"
    raise ConfigError(
        f"ray_actor_options of LMReplica has {said}, its engine uses {used}; {advice}",
        "ray_actor_options",
    )
