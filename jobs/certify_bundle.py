"""`iab-vision certify`: adds the certificate of this machine's provider to an existing bundle.

    iab-vision certify BUNDLE --images photos --provider cuda --precisions fp16

On a GPU node this makes what a CPU node exported runnable there. Exit code 3 when a precision differs too
much; its certificate then says so, and classify does not run it. What is compared with is the bundle's own
float32 model on CPU; that one itself can only be certified against its run: `--checkpoint RUN`.
"""

from jobs.config import CertifyConfig
from jobs.errors import checking_input
from pipelines.messages import redact


def run(config: CertifyConfig) -> int:
    from export import release, report

    with checking_input():
        certificates = release.certify(
            config.bundle,
            config.images,
            provider=config.provider,
            precisions=config.precisions,
            settings=config.parity,
            checkpoint_uri=config.checkpoint,
        )
    for (provider, precision), document in certificates.items():
        print(report.one_line(provider, precision, document))
    print(f"report: {redact(config.bundle.rstrip('/'))}/certificates/{config.provider}.html")
    return 0
