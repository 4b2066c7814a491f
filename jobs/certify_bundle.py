"""`iab-vision certify`: adds the certificate of this machine's provider to an existing bundle.

    iab-vision certify BUNDLE --images photos --provider cuda --precisions fp16

On a GPU node this makes what a CPU node exported runnable there. Exit code 3 when a precision differs too
much; its certificate then says so, and classify does not run it. What is compared with is the bundle's own
float32 model on CPU; that one itself is certified anew only against its run: `--checkpoint RUN`.
"""

from jobs.config import CertifyConfig
from jobs.errors import checking_input
from pipelines.messages import Refused


def run(config: CertifyConfig) -> int:
    from export import certification

    with checking_input():
        try:
            documents = certification.certify(
                config.bundle,
                config.images,
                provider=config.provider,
                precisions=config.precisions,
                measuring=config.parity,
                checkpoint_uri=config.checkpoint,
            )
        except certification.ParityRefused as error:
            raise Refused(str(error)) from error
    for (provider, precision), document in documents.items():
        print(certification.one_line(provider, precision, document))
    return 0
