"""Protects MoE training: keep a stage's state and inbox in host memory, replay them on failure.

The words, used everywhere and with one meaning:

operator                 the unit of capture: one expert, one router, the rest of a layer, the
                         embedding, the output head
frame                    what one rank captured after the optimizer step of one iteration
full / light             an operator's full state / its compute weights
active / frozen          in replay: has full state and is updated / only passes gradients through
window (W)               number of consecutive frames in which every operator is full once
base                     the iteration whose frame starts a reconstruction
cut                      where state is rebuilt: a pipeline stage by replay (stage), or an optimizer
                         shard by the gradients of its updates (shard)
boundary tensor          an activation or gradient that crosses a stage edge
inbox                    the logged inputs of a stage for one iteration
interlude                what the host does between two training steps and can do again as a whole:
                         evaluating, saving a checkpoint
vault                    the host-memory store of frames and logs; it lives in the agent
agent                    one process per node: starts and watches the workers, owns the vault
epoch                    generation of the process groups; grows by one with every recovery
commit point             the moment after which an iteration counts as done everywhere
survivor / replacement   a worker that lived through the failure / the process that takes
                         the dead one's rank
rehearsal                the real training loop on CPU with gloo

Iteration i is the state after optimizer step i.
"""

__version__ = "0.1.0"
