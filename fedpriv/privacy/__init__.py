from fedpriv.privacy.plan import *
from fedpriv.privacy.plan import PrivacyPlan, make_plan, privacy_statement
from fedpriv.privacy.sampling import *
