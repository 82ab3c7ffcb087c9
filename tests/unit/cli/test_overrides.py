"""`--set`: names that are found, values that are typed, mistakes that are named."""

from __future__ import annotations

import pytest

from common.cli.overrides import parse_labels, parse_sets
from common.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "group", "option", "value"),
    [
        ("learning_rate=1e-4", "hyperparameters", "learning_rate", 1e-4),
        ("learning_rate=.5", "hyperparameters", "learning_rate", 0.5),
        ("hyperparameters.max_steps=30", "hyperparameters", "max_steps", 30),
        ("num_train_epochs=2", "hyperparameters", "num_train_epochs", 2.0),
        ("packing=True", "hyperparameters", "packing", True),
        ("packing=auto", "hyperparameters", "packing", "auto"),
        ("optim=adamw_torch", "hyperparameters", "optim", "adamw_torch"),
        ("r=8", "lora", "r", 8),
        ("lora.lora_alpha = 16", "lora", "lora_alpha", 16.0),
        ("target_modules=all-linear", "lora", "target_modules", "all-linear"),
        ("target_modules=q_proj,v_proj", "lora", "target_modules", ["q_proj", "v_proj"]),
        ('target_modules=["q_proj"]', "lora", "target_modules", ["q_proj"]),
        ("target_modules=.*(q|v)_proj{1,2}", "lora", "target_modules", ".*(q|v)_proj{1,2}"),
        ("modules_to_save=lm_head", "lora", "modules_to_save", ["lm_head"]),
        ("modules_to_save=model.norm,lm_head", "lora", "modules_to_save", ["model.norm", "lm_head"]),
        ("init_lora_weights=false", "lora", "init_lora_weights", False),
        ("init_lora_weights=pissa_niter_4", "lora", "init_lora_weights", "pissa_niter_4"),
        ("bnb_4bit_quant_type=fp4", "quantization", "bnb_4bit_quant_type", "fp4"),
    ],
)
def test_values_are_typed(text, group, option, value):
    assert parse_sets([text]) == {group: {option: value}}
    assert type(parse_sets([text])[group][option]) is type(value)


def test_several_are_put_together_and_the_last_wins():
    assert parse_sets(["r=8", "max_steps=5", "lora.r=4"]) == {"lora": {"r": 4}, "hyperparameters": {"max_steps": 5}}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("learning_rat=1", "there is no option 'learning_rat'", "did you mean learning_rate"),
        ("lora.rr=1", "there is no option 'lora.rr'", "r"),
        ("hyperparams.max_steps=1", "there is no group 'hyperparams'", "did you mean hyperparameters"),
        ("zzz=1", "there is no option 'zzz'", "one of num_train_epochs"),
        ("seed=1", "not set this way", "use --seed"),
        ("chat_template=x", "not set this way", "use --chat-template FILE"),
        ("validation_dataset=x", "not set this way", "use --validation"),
        ("learning_rate", "not of the form", "learning_rate=1e-4"),
        ("=1", "not of the form", "learning_rate=1e-4"),
        ("learning_rate=fast", "a valid number or input should be 'auto'", "0.0002"),
        ("max_steps=1e3", "a valid integer", "-1"),
        ("r=0", "greater than or equal to 1", "16"),
        ("packing=1", "a valid boolean or input should be 'bfd'", "false"),
        ("optim=sgd", "'paged_adamw_8bit'", "paged_adamw_8bit"),
        ("learning_rate=NaN", "", "0.0002"),
    ],
)
def test_mistakes_are_named(text, message, hint):
    with pytest.raises(InvalidInput) as caught:
        parse_sets([text])
    assert caught.value.message.startswith(f"--set {text}: ")
    assert message in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint


def test_labels():
    assert parse_labels(["a=b", "c=d=e", "f="]) == {"a": "b", "c": "d=e", "f": ""}
    for text in ("a", "=b"):
        with pytest.raises(InvalidInput, match="key=value"):
            parse_labels([text])
