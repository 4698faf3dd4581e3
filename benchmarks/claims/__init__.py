"""The paper's claims measured on our model: retrieval, the suite, memory, throughput."""
