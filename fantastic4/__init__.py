"""How much can this convolution stretch a vector? Sound, differentiable bounds for JAX and Flax."""

from fantastic4 import dense as dense
from fantastic4 import heuristics as heuristics
from fantastic4 import jacobian as jacobian
from fantastic4 import ladder as ladder
from fantastic4 import network as network
from fantastic4.bounds import FourBounds as FourBounds
from fantastic4.bounds import PowerState as PowerState
from fantastic4.bounds import bound as bound
from fantastic4.bounds import four_bounds as four_bounds
from fantastic4.bounds import init as init
from fantastic4.bounds import step as step
from fantastic4.clipping import clip_singular_values as clip_singular_values
from fantastic4.conv import ConvSpec as ConvSpec
from fantastic4.heuristics import estimate_miyato as estimate_miyato
from fantastic4.heuristics import estimate_ryu as estimate_ryu
from fantastic4.heuristics import estimate_sedghi as estimate_sedghi
from fantastic4.heuristics import estimate_tnn as estimate_tnn
from fantastic4.interval import Interval as Interval
from fantastic4.interval import norm_interval as norm_interval
from fantastic4.layout import from_torch as from_torch
from fantastic4.spectrum import exact_norm as exact_norm
from fantastic4.spectrum import singular_values as singular_values
from fantastic4.spectrum import singular_vectors as singular_vectors

__version__ = "0.1.0"
