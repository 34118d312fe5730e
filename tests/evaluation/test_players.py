"""Players: their names, the samples they choose among, best-of-n and majority vote against plain references."""

import random

import pytest
from helpers import favour, plain_score, random_ids, tiny_policy, tiny_reward_model, tiny_tokenizer
from omegaconf import OmegaConf

from threefold.data import tasks
from threefold.errors import UserError
from threefold.evaluation import measuring
from threefold.evaluation.players import Player, player, policy_name, stages_of
from threefold.models.ensemble import Ensemble
from threefold.rewards.exact import exact_match
from threefold.rewards.learned import learned
from threefold.sampling import sampler

PROMPTS = random_ids([3, 11, 1, 6, 20], seed=1)
HOW = OmegaConf.create({"temperature": 0.7, "max_new_tokens": 12, "batch_size": 4, "static_cache": False})
PLAIN, BEST, MOST = Player("sft"), Player("sft", "best_of", 4), Player("sft", "majority", 4)


def drawn(count, seed=5, prompts=PROMPTS):
    policy = favour(tiny_policy(), tiny_tokenizer().eos_token_id, 2.0)
    return measuring.samples(policy, prompts, count, HOW, tiny_tokenizer(), seed)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("base", Player("base")),
        ("best_of_16", Player("sft", "best_of", 16)),
        ("majority_3", Player("sft", "majority", 3)),
        ("sft_best_of_2", Player("sft", "best_of", 2)),
        ("ppo_majority_100", Player("ppo", "majority", 100)),
    ],
)
def test_a_name_says_who_plays_and_how(name, meant):
    assert player(name, "evaluate.models") == meant


@pytest.mark.parametrize(
    "name", ["", "human", "ppo_", "ppo_best_of", "best_of_1", "best_of_0", "xpo_best_of_4", "ppo_best_of_4 "]
)
def test_any_other_name_is_refused_with_the_key(name):
    with pytest.raises(UserError, match=r"^chat\.model: "):
        player(name, "chat.model")


def test_only_best_of_n_needs_the_reward_model():
    assert stages_of([player("base", ""), player("ppo_majority_4", "")]) == {"pretrain", "ppo"}
    assert stages_of([player("dpo_best_of_4", "")]) == {"dpo", "reward"}
    assert policy_name("runs/first/ppo/") == "first/ppo"


def test_the_first_samples_are_the_same_however_many_are_drawn():
    one, two, five = ([[reply.ids for reply in group] for group in drawn(count)] for count in (1, 2, 5))
    assert [group[:1] for group in five] == one and [group[:2] for group in five] == two
    assert all(len({tuple(ids) for ids in group}) > 1 for group in five)
    numbers = sampler.random_numbers(5, len(PROMPTS), HOW)
    policy = favour(tiny_policy(), tiny_tokenizer().eos_token_id, 2.0)
    alone = sampler.sample(policy, PROMPTS, HOW, tiny_tokenizer(), numbers)
    assert [[reply.ids] for reply in alone] == one
    assert [[reply.ids for reply in group] for group in drawn(5)] == five
    assert [[reply.ids for reply in group] for group in drawn(5, seed=6)] != five


def test_best_of_n_is_the_sample_that_the_reward_model_scores_highest():
    model, sampled = tiny_reward_model(), drawn(6)
    texts = measuring.texts_of(tiny_tokenizer(), sampled)
    scorer, messages = learned(Ensemble([model]), tiny_tokenizer(), 3), [[]] * len(PROMPTS)
    scores = measuring.proxy_scores(scorer, messages, PROMPTS, sampled, texts)
    picks = set()
    for prompt, group, said, found in zip(PROMPTS, sampled, texts, scores, strict=True):
        plain = [(plain_score(model, prompt + reply.ids) - 0.3) / 1.7 for reply in group]
        assert found == pytest.approx(plain, abs=1e-4)
        pick = measuring.chosen_sample(BEST, said, found)
        assert plain[pick] == max(plain[:4]) and measuring.chosen_sample(PLAIN, said, found) == 0
        picks.add(pick)
    assert len(picks) > 1
    assert measuring.chosen_sample(BEST, ["a"] * 5, [0.0, 1.0, 1.0, 0.5, 9.0]) == 1


def test_the_majority_is_the_most_frequent_answer_and_of_several_the_one_sampled_first():
    chance = random.Random(1)
    for _ in range(300):
        answers = [chance.choice("abcd") for _ in range(chance.randint(1, 9))]
        most = max(answers.count(one) for one in answers)
        first = next(i for i, one in enumerate(answers) if answers.count(one) == most)
        assert measuring.majority(answers) == first, answers


def test_a_vote_is_for_the_number_of_a_reply_and_otherwise_for_its_words():
    texts = ["Hello", "It is 4.", "hello", "2 and 2 make #### 4", "4.0"]
    assert measuring.chosen_sample(MOST, texts, None) == 1
    assert measuring.chosen_sample(MOST, ["no number", "7", "no  number\n", "4"], None) == 0
    assert measuring.chosen_sample(MOST, ["", "a", "b", "a", "", ""], None) == 1  # the fifth has no vote
    assert measuring.final_answer("1,000") == measuring.final_answer("$1000.00") != measuring.final_answer("one")


def sampled_answers(right, wrong, chance):
    """An answer to a problem: right with probability `right`, else one of `wrong` wrong ones."""
    problems = chance.sample(tasks.arithmetic(), 300)
    known = [int(problem["completion"]) for problem in problems]
    texts = [
        [str(one if chance.random() < right else one + chance.randint(1, wrong)) for _ in range(15)] for one in known
    ]
    return [str(one) for one in known], texts


@pytest.mark.parametrize(("right", "wrong", "improves"), [(0.45, 10, True), (0.3, 1, False)])
def test_on_problems_a_majority_is_right_more_often_where_the_right_answer_is_the_most_likely(right, wrong, improves):
    known, texts = sampled_answers(right, wrong, random.Random(2))
    vote = Player("ppo", "majority", 15)
    single = sum(exact_match([], [said[0] for said in texts], known)) / 300
    voted = sum(exact_match([], [said[measuring.chosen_sample(vote, said, None)] for said in texts], known)) / 300
    assert single == pytest.approx(right, abs=0.08)
    assert voted > 0.95 if improves else voted < 0.12
