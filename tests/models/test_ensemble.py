"""Several reward models as one score: combinations by hand, saved and loaded, and PPO's use of them."""

import numpy as np
import pytest
import torch
from helpers import (
    PROMPTS,
    make_job,
    plain_score,
    random_ids,
    tiny_policy,
    tiny_reward_model,
    tiny_tokenizer,
    write_model,
)

from threefold.errors import UserError
from threefold.models import ensemble, loading
from threefold.models.ensemble import Ensemble
from threefold.ppo import actors, safety
from threefold.stages import ppo

PAD, ROWS = tiny_tokenizer().pad_token_id, random_ids([3, 9, 5, 1, 12], seed=4)


def by_hand(model) -> np.ndarray:
    config = model.config
    return np.array([(plain_score(model, row) - config.score_mean) / config.score_std for row in ROWS])


def members() -> list[torch.nn.Module]:
    found = [tiny_reward_model(seed=seed) for seed in (1, 2, 3)]
    for i, model in enumerate(found):
        model.config.score_mean, model.config.score_std = 0.1 * i, 1.0 + 0.5 * i
    return found


@pytest.mark.parametrize("combine", ["mean", "min", "uncertain"])
def test_members_are_combined_as_the_name_says_on_their_own_scales(combine):
    models_ = members()
    scores = np.stack([by_hand(model) for model in models_])
    plain = {"mean": scores.mean(0), "min": scores.min(0), "uncertain": scores.mean(0) - 0.7 * scores.var(0)}[combine]
    assert np.ptp(scores, axis=0).max() > 0.05  # they differ
    found = Ensemble(models_, combine, 0.7, (0.3, 2.0)).scores(ROWS, PAD, batch_size=2)
    assert found.numpy() == pytest.approx((plain - 0.3) / 2.0, abs=1e-4)


def test_one_model_is_its_own_score(tmp_path):
    model = members()[1]
    assert ensemble.joined([model]).scores(ROWS, PAD).numpy() == pytest.approx(by_hand(model), abs=1e-4)
    write_model(model, tmp_path)
    assert len(ensemble.load(tmp_path).members) == 1


def saved(folder, combine="min") -> Ensemble:
    made = Ensemble(members(), combine, 0.5, (0.2, 1.5))
    made.members[0].config.ensemble = made.settings()
    write_model(made.members[0], folder)
    for number in (2, 3):
        write_model(made.members[number - 1], folder / ensemble.MEMBERS / str(number))
    return made


def test_an_ensemble_is_saved_and_loaded_in_order(tmp_path):
    made = saved(tmp_path)
    loaded = ensemble.load(tmp_path)
    assert (loaded.combine, loaded.coef, loaded.scale) == ("min", 0.5, (0.2, 1.5))
    ours, theirs = (each.member_scores(ROWS, PAD).flatten().tolist() for each in (made, loaded))
    assert theirs == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("options", [[], ["ppo.lora_rank=2"], ["ppo.critic=shared"]])
def test_ppo_scores_with_every_member_and_its_critic_starts_from_the_first(tmp_path, options):
    made = saved(tmp_path / "reward")
    job = make_job("ppo", tmp_path, "ppo.batch_size=12", "sampling.max_new_tokens=6", *options)
    job.inputs |= {"sft": write_model(tiny_policy(), tmp_path / "sft"), "reward": tmp_path / "reward"}
    loaded = ppo.load(job)
    expected = made.scores([p.ids for p in PROMPTS], PAD).tolist()
    found = loaded.actors.reward_model.scores([p.ids for p in PROMPTS], PAD).tolist()
    assert found == pytest.approx(expected, abs=1e-4)
    rollout = ppo.roll_out(loaded, PROMPTS, 0)
    first = made.members[0]
    if not loaded.actors.shared:
        scores = [(plain_score(first, p.ids) - first.config.score_mean) / first.config.score_std for p in PROMPTS]
        assert rollout.values[:, 0].tolist() == pytest.approx(scores, abs=1e-4)
    size = 4 * sum(p.numel() for p in loading.load_reward_model(tmp_path / "reward").parameters())
    outline = actors.load(job.config.ppo, job.inputs, "meta")
    needed = safety.memory_needed(outline, 20, 4, 4)
    assert needed["reward model weights"] + needed.get("critic weights", 0) >= 3 * size


def test_a_score_that_is_no_number_is_refused():
    broken = tiny_reward_model(seed=1)
    with torch.no_grad():
        broken.score.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="reward model: its score of 5 of 5 replies is no finite number"):
        Ensemble([tiny_reward_model(seed=2), broken]).scores(ROWS, PAD)
