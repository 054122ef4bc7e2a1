-- fits.sql
-- grain: one row per verified trace of a prompt of the round: the mean log-prob of its tokens under the policy that the round samples.
-- reads: fit_logprobs (the round's logprobs of roles fit-TEACHER). parameters: none.
select item_id as trace_id, list_avg(logprobs) as logp
from fit_logprobs
