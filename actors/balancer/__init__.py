"""Even work for the ranks that share the experts: where replicas live follows the load that the router makes."""

from .actor import Balancer as Balancer
