"""Determines which samples a step consumes: the global order, mixtures of sources, and a measure of shuffling."""

from bigtrain.data.order.sample_order import SampleOrder as SampleOrder
