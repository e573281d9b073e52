"""What is drawn to compare with the frameworks' default constructors."""

from hypothesis import strategies as st
from torch import nn

from tests.optimizers.models import Zoo

FACTORS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0])
KEYS = [
    'block',
    'deform',
    '.bias',
    'bias',
    'norm',
    'conv',
    'offset',
    'zoo.stem',
    'zoo',
]
CUSTOM = st.dictionaries(
    st.sampled_from(KEYS),
    st.fixed_dictionaries(
        {}, optional=dict(lr_mult=FACTORS, decay_mult=FACTORS)
    ),
    max_size=4,
)


def options(*names):
    """Draw a ``paramwise_cfg`` with some of the factors."""
    given = dict.fromkeys(names, FACTORS)
    return st.fixed_dictionaries({}, optional={**given, 'custom_keys': CUSTOM})


class Compared(nn.Module):
    """Every rule of the frameworks finds something here."""

    def __init__(self, deformable):
        super().__init__()
        self.zoo = Zoo()
        self.block = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 4, 3, groups=4),
            nn.InstanceNorm2d(4, affine=True),
            nn.LayerNorm(4),
            nn.Linear(4, 4),
        )
        self.deformable = deformable
        self.deformable.gate = nn.Conv2d(4, 4, 1, groups=4)
        self.deformable.norm = nn.BatchNorm2d(4)
        self.again = self.block[5]
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.block[5].weight


def rates(optimizer, model):
    """Return parameter -> (lr, weight decay) of what is trained."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group['lr'], group['weight_decay'])
        for group in optimizer.param_groups
        for p in group['params']
        if p.requires_grad
    }


NEUTRAL = dict(
    decay_kinds=['weight', 'norm', 'bias', 'other'], nominal_batch_size=None
)
"""What we do by default, switched off."""
