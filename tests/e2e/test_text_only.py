# SPDX-License-Identifier: Apache-2.0
"""A model that takes images too, served without: its checkpoint as it is, its text model's tokens, and images refused."""

import pytest
import torch

from helpers import tiny_models
from helpers.engines import engine, greedy_params, tokens

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(the whole model, its text model alone)."""
    import transformers

    text = tiny_models.build("llama4@8")
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    sizes = dict(patch_size=14, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    config = transformers.Llama4Config(
        text_config=text.config.to_dict(), vision_config={**vision, **sizes}, boi_token_index=5, eoi_token_index=6,
        image_token_index=7,
    )  # fmt: skip
    whole = transformers.Llama4ForConditionalGeneration(config)
    whole.language_model.load_state_dict(text.state_dict())
    directories = [str(tmp_path_factory.mktemp(name)) for name in ("whole", "text")]
    for model, directory in zip((whole.to(torch.float32), text), directories, strict=True):
        model.save_pretrained(directory)
    return directories


def test_llama_4(checkpoints):
    whole, text = checkpoints
    batch = tiny_models.prompts(3, seed=4)
    with engine(whole) as llm:
        assert tokens(llm, batch, 24) == [tiny_models.greedy(text, prompt, 24) for prompt in batch]
        image = {"prompt_token_ids": batch[0], "multi_modal_data": {"image": torch.zeros(3, 28, 28)}}
        with pytest.raises(ValueError, match=r"(?i)multi-?modal"):
            llm.generate([image], greedy_params(4), use_tqdm=False)
        assert tokens(llm, batch[:1], 8) == [tiny_models.greedy(text, batch[0], 8)]
