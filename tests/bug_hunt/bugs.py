"""All planted bugs, by name."""

from .bug import Bug
from .caches import CACHES
from .kernels import KERNELS
from .models import MODELS
from .weights import WEIGHTS

BUGS: dict[str, Bug] = {bug.name: bug for bug in (*KERNELS, *WEIGHTS, *MODELS, *CACHES)}
