"""The dataflow: plan -> load -> infer -> write part."""
