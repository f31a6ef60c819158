"""The reference mixture: OLMoE's shape, 6 layers, 8 experts of which 2 are active, 3.9 million parameters.

python examples/reference_models/mixture.py
"""

from language import LONG, LanguageModel, main
from transformers import OlmoeConfig, OlmoeForCausalLM
from vocabulary import END_ID, PADDING_ID, SIZE

from graphopt.training import Settings

CONFIG = OlmoeConfig(
    vocab_size=SIZE,
    hidden_size=192,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=False,
    output_router_logits=True,  # so that its loss balances the experts
    router_aux_loss_coef=0.01,
    max_position_embeddings=LONG,
    bos_token_id=END_ID,
    eos_token_id=END_ID,
    pad_token_id=PADDING_ID,
)

MODEL = LanguageModel(
    name="mixture",
    title="a small mixture of experts",
    build=lambda: OlmoeForCausalLM(CONFIG),
    settings=Settings(
        steps=1600, learning_rate=4e-3, warmup=100, schedule="cosine", final=0.02, weight_decay=0.1, seed=2
    ),
)

if __name__ == "__main__":
    main(MODEL)
