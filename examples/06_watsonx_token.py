"""IBM watsonx with a token that is fetched when it is needed.

You will see an answer of Granite. It needs WATSONX_API_KEY and WATSONX_PROJECT_ID. Ember calls
`iam_token` before the first call, shares the token among all, and asks again before it expires.
"""

import asyncio
import os

import httpx

from ember import SetupError, model

IAM_URL = "https://iam.cloud.ibm.com/identity/token"


async def iam_token() -> tuple[str, float]:
    """A token for the API key in the environment, and how many seconds it lives."""
    key = os.environ.get("WATSONX_API_KEY")
    if not key:
        raise SetupError("set WATSONX_API_KEY to an API key of IBM Cloud")
    form = {"grant_type": "urn:ibm:params:oauth:grant-type:apikey", "apikey": key}
    async with httpx.AsyncClient() as client:
        answer = await client.post(os.environ.get("WATSONX_IAM_URL", IAM_URL), data=form)
    if answer.status_code in {400, 401, 403}:
        raise SetupError("IBM Cloud refused WATSONX_API_KEY. Make a new one")
    token = answer.raise_for_status().json()
    return token["access_token"], token["expires_in"]


async def main() -> None:
    """Ask once."""
    granite = model("watsonx:ibm/granite-3-8b-instruct", api_key=iam_token)
    print(await granite("What is granite made of?", max_tokens=200))


if __name__ == "__main__":
    asyncio.run(main())
