//! What the tests share: the test cluster and the workloads.
