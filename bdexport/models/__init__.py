"""The networks in torch (build half only): residual network, policy network, and the pair of them."""
