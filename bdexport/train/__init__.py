"""Training of BlockDrop (Wu et al., CVPR 2018): reward, rollout, curriculum, finetuning, and the loop around them.

:mod:`~bdexport.train.pipeline` tells the story: a request is checked, its parts are prepared, the loop runs the phases
(:mod:`~bdexport.train.phases`, and those of other methods beside it) and chooses, and the run is finished.

Deviations from the paper and its released code, each a named setting in :mod:`bdexport.config`:

* the network can first be adapted by stochastic depth (``adapt``), which the paper does not do;
* a budget loss can bind the mean block usage to a target (``policy.target_blocks``);
* the reward can use the probability of the true class instead of 0/1 (``policy.reward = "probability"``);
* the entropy bonus is the full Bernoulli entropy of the open blocks only and is annealed (the released code's is
  one-sided and also covers blocks that the curriculum holds open);
* the undropped base network can teach the kept paths (``distillation_weight``);
* batch norm never sees an image that drops its block, the greedy baseline never updates the statistics, and the
  statistics are re-estimated on greedy paths at the end;
* a validation split is held out, and every choice is made on it.
"""
