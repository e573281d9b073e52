"""What a config imports for DeepSpeed on several ranks without a GPU."""

import deepspeed

# its operators would be compiled first
deepspeed.ops.__compatible_ops__.clear()

from tests.e2e import cpu_ranks  # noqa: E402, F401
