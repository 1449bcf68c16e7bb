"""Pictures of results: figures drawn with matplotlib, and pages for a notebook or a browser."""

from tljax.viz.attention import attention_figure as attention_figure
from tljax.viz.attention import attention_patterns as attention_patterns
from tljax.viz.drawing import MAX_PANELS as MAX_PANELS
from tljax.viz.features import feature_activations as feature_activations
from tljax.viz.heatmap import heatmap as heatmap
from tljax.viz.heatmap import text_heatmap as text_heatmap
from tljax.viz.html import Html as Html
from tljax.viz.lens_table import logit_lens_figure as logit_lens_figure
from tljax.viz.lens_table import logit_lens_table as logit_lens_table
from tljax.viz.scatter import scatter as scatter
from tljax.viz.tokens import colored_tokens as colored_tokens
from tljax.viz.tokens import colored_tokens_figure as colored_tokens_figure
