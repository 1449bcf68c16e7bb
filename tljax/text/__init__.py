"""Text and tokens: tokenizers, token ids, batches and padding."""

from tljax.text.alignment import align as align
from tljax.text.tokenizer import Tokenizer as Tokenizer
from tljax.text.tokenizer import wrap_tokenizer as wrap_tokenizer
from tljax.text.tokenizer_files import load_tokenizer as load_tokenizer
from tljax.text.tokens import TruncationWarning as TruncationWarning
from tljax.text.tokens import get_attention_mask as get_attention_mask
from tljax.text.tokens import get_token_position as get_token_position
from tljax.text.tokens import to_single_str_token as to_single_str_token
from tljax.text.tokens import to_single_token as to_single_token
from tljax.text.tokens import to_str_tokens as to_str_tokens
from tljax.text.tokens import to_string as to_string
from tljax.text.tokens import to_tokens as to_tokens
