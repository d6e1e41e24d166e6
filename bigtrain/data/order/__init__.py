"""Which samples a step consumes: the global order, mixtures of sources, and how well the order shuffles."""

from bigtrain.data.order.sample_order import SampleOrder as SampleOrder
