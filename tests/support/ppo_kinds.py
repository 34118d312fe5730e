"""PPO with full weights and LoRA, a critic of its own and a shared one, at test size."""

from helpers import PROMPTS, make_job, perturb, tiny_policy, tiny_reward_model, write_model
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from threefold.models import lora
from threefold.ppo.advantages import estimate
from threefold.stages import ppo

LORA = ["ppo.lora_rank=4", "ppo.learning_rate=0.01", "ppo.critic_learning_rate=0.01"]
SHARED = ["ppo.critic=shared"]
KINDS = {"full": [], "shared": SHARED, "lora": LORA, "lora, shared": LORA + SHARED}


def inputs(folder, reward: str = "full", model_type: str = "qwen3") -> dict:
    """Artifacts of SFT and of a reward model: trained in full, or as an adapter on the SFT model."""
    sft = write_model(tiny_policy(model_type), folder / "sft")
    model = tiny_reward_model(model_type)
    if reward == "lora":
        start = AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1)
        config = lora.adapter_config(start, 3, 6.0, modules_to_save=["score"], task_type="SEQ_CLS")
        adapted = get_peft_model(start, config)
        perturb(adapted, 0.0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        adapted.save_pretrained(folder / "reward" / "adapter")
        model = adapted.merge_and_unload().eval()
        model.config.score_mean, model.config.score_std = 0.2, 1.5
    return {"sft": sft, "reward": write_model(model, folder / "reward")}


def loaded(folder, *overrides: str, reward: str = "full", model_type: str = "qwen3") -> ppo.Ppo:
    job = make_job("ppo", folder, "ppo.batch_size=12", "ppo.minibatches=2", "sampling.max_new_tokens=10", *overrides)
    job.inputs |= inputs(folder, reward, model_type)
    return ppo.load(job)


def trained(made: ppo.Ppo, rollouts: int = 1) -> ppo.Ppo:
    ppo.set_learning_rates(made, 1.0)
    for number in range(rollouts):
        rollout = ppo.roll_out(made, PROMPTS, number)
        advantages, returns, _ = estimate(rollout, 0.05, made.config)
        ppo.update(made, rollout, advantages, returns, number)
    return made
